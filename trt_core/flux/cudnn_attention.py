"""cuDNN's attention with E4M3 operands, through NVIDIA's front end (pip install nvidia-cudnn-frontend).

PyTorch's own call of cuDNN takes no E4M3. Source of the graph: NVIDIA's cudnn-frontend, `sdpa_fp8`. On Hopper the
result is E4M3 as well; nothing is trained here, so no statistics are kept.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from ..packages import CUDNN_FRONTEND
from .fp8 import FP8, FP8_MAX

_KEPT_SHAPES = 16
"""Graphs that are kept; one takes about 0.1 s to make."""


def installed() -> bool:
    return importlib.util.find_spec("cudnn") is not None


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph for one shape with what it needs at each call: numbers of its tensors, and addresses of those that stay.

    Numbers and addresses, because the front end looks at every tensor anew otherwise, 57 times per step.
    """

    graph: Any
    handle: Any
    operands: tuple[int, int, int, int, int]
    """Of q, k, v, the result and its factor."""
    addresses: dict[int, int]
    """Of its scales."""
    workspace: Tensor
    kept: tuple[Tensor, ...]
    """What lies at `addresses`."""


def attend(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """[B, L, H, D] E4M3 of contiguous E4M3 operands of that shape on a GPU, times `factor` (fp32, one element) before
    it is rounded. Runs on PyTorch's current stream."""
    import cudnn

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(v)
    with torch.cuda.device(q.device):
        made = graph_of(q.device.index, *q.shape)
        cudnn.set_stream(made.handle, torch.cuda.current_stream().cuda_stream)
        places = zip(made.operands, (x.data_ptr() for x in (q, k, v, out, factor)), strict=True)
        made.graph.execute({**made.addresses, **dict(places)}, made.workspace.data_ptr(), handle=made.handle)
    return out


@lru_cache(maxsize=8)
def _handle(device_index: int) -> Any:
    import cudnn

    return cudnn.create_handle()


@lru_cache(maxsize=_KEPT_SHAPES)
def graph_of(device_index: int, batch: int, tokens: int, heads: int, dim: int) -> Graph:
    """cuDNN's graph for these sizes, made once. Who records launches of it (a CUDA graph) keeps it: its workspace and
    scales are read at their addresses."""
    import cudnn

    kinds, handle = cudnn.data_type, _handle(device_index)
    graph = cudnn.pygraph(
        handle=handle, io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
    )
    layout = {"dim": [batch, heads, tokens, dim], "stride": [tokens * heads * dim, dim, heads * dim, 1]}
    query, key, value = (graph.tensor(name=name, data_type=kinds.FP8_E4M3, **layout) for name in "qkv")
    one = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
    scales = {name: graph.tensor(name=name, data_type=kinds.FLOAT, **one) for name in (*_SCALES, _FACTOR)}
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        q=query, k=key, v=value, **scales, is_inference=True, attn_scale=dim**-0.5, use_causal_mask=False
    )
    out.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(kinds.FP8_E4M3)
    for unread in (amax_s, amax_o):
        # No outputs: cuDNN would set each to zero first, two launches more (H100: 276 for 284 us, of two pictures 546
        # for 552; the same bits).
        unread.set_output(False).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(kinds.FLOAT)
    _build(graph, cudnn.heur_mode.A)
    kept = {scales[name].get_uid(): _scalar(value, device_index) for name, value in _SCALES.items()}
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device_index)
    operands = tuple(tensor.get_uid() for tensor in (query, key, value, out, scales[_FACTOR]))
    addresses = {uid: tensor.data_ptr() for uid, tensor in kept.items()}
    return Graph(graph, handle, operands, addresses, workspace, tuple(kept.values()))


_SCALES = {
    "descale_q": 1.0, "descale_k": 1.0, "descale_v": 1.0, "descale_s": 1 / FP8_MAX, "scale_s": FP8_MAX,
}  # fmt: skip
"""v's own scale is left to the reader of the result: an average of v is in v's units."""
_FACTOR = "scale_o"


def _build(graph: Any, heuristic: Any) -> None:
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([heuristic])
    graph.check_support()
    graph.build_plans()


def _scalar(value: float, device_index: int) -> Tensor:
    return torch.full((1, 1, 1, 1), value, device=torch.device("cuda", device_index))


def why_not(device: torch.device, dim: int) -> str | None:
    """Why cuDNN has no such kernel for heads of `dim`, or None; tried on a few tokens."""
    try:
        import cudnn
    except (ImportError, OSError, RuntimeError) as error:
        return f"{CUDNN_FRONTEND} does not start: {first_line(error)}"
    sample = torch.zeros((1, 64, 1, dim), device=device).to(FP8)
    try:
        attend(sample, sample, sample, torch.ones(1, device=device))
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        return f"cuDNN refuses it: {first_line(error)}"
    return None
