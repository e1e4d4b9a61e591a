"""E4M3 attention of a single block and, beside it on a second stream, the GELU that waits for nothing from it.

linear2 reads attention's output and gelu(mlp) as one row with one scale. That scale does not need attention's output:
an average of values is at most as large as the largest value, so E4M3 numbers of attention with v's scale fit wherever
the row's scale is v's or larger. A scale 2 ** 8 times larger than needed still costs E4M3 no precision.

Measured on an H100 in whole steps, each to eager bf16 of its own run: two pictures 0.415 for 0.418 before, one picture
0.415 for 0.413. That is all: power limits the GPU there, not idle multiprocessors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cudnn_attention, fp8_attention, fused, operators, side_stream
from .fp8 import FP8, quantize_tensor, row_scale
from .fp8_attention import QkvStream, quantized_qkv


def attend_joined(stream: QkvStream, mlp: Tensor, heads: int, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of `stream` and gelu(mlp) joined, [B, L, hidden + M], in E4M3, and its scales.

    mlp [B, L, M] in any float dtype. The scales are `input_scale` (fp32, one element), or with None new ones, fp32
    [B, L, 1], each at least v's.
    """
    joined, scales = _OPERATOR(*quantized_qkv(stream, None, heads), mlp, input_scale)
    return joined, scales if input_scale is None else input_scale


def reference(
    q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, mlp: Tensor, input_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch; with `input_scale` the scales have no elements."""
    return joined_by(fp8_attention.reference(q, k, v).flatten(2), v_scale, mlp, input_scale)


def joined_by(attn: Tensor, attn_scale: Tensor, mlp: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """attn [B, L, hidden] (E4M3, times `attn_scale`) and gelu(mlp) as `reference` returns them."""
    activated = F.gelu(mlp, approximate="tanh")
    scale = torch.maximum(row_scale(activated), attn_scale) if input_scale is None else input_scale
    parts = (quantize_tensor(attn.float() * attn_scale, scale), quantize_tensor(activated, scale))
    return torch.cat(parts, -1), scale if input_scale is None else _none(mlp)


def _on_cuda(
    q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, mlp: Tensor, input_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernels, static = fused.joined_kernels(mlp.shape[-1]), input_scale is not None
    if kernels is None:
        return joined_by(cudnn_attention.attend(q, k, v).flatten(2), v_scale, mlp, input_scale)
    mlp = mlp if mlp.stride(-1) == 1 else mlp.contiguous()
    joined, scales = kernels.outputs(q.shape[-2] * q.shape[-1], mlp)
    scales = scales if input_scale is None else input_scale
    with side_stream.forked(q.device) as side:
        attn = cudnn_attention.attend(q, k, v).flatten(2)
        with torch.cuda.stream(side):
            kernels.gelu_beside(mlp, v_scale, joined, scales, static)
    kernels.join_beside_gelu(attn, v_scale, joined, scales, static)
    return joined, _none(mlp) if static else scales


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, mlp: Tensor, input_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = mlp.shape
    joined = mlp.new_empty((batch, tokens, q.shape[-2] * q.shape[-1] + width), dtype=FP8)
    scales = mlp.new_empty((batch, tokens, 1), dtype=torch.float32) if input_scale is None else _none(mlp)
    return joined, scales


def _none(like: Tensor) -> Tensor:
    """No scales: what an operator returns has no memory in common with what it is given."""
    return like.new_empty(0, dtype=torch.float32)


# An operator, because Inductor launches everything that it compiles on one stream.
_OPERATOR = operators.define(
    __name__,
    "attention_beside_gelu(Tensor q, Tensor k, Tensor v, Tensor v_scale, Tensor mlp, Tensor? input_scale)"
    " -> (Tensor, Tensor)",
    _on_cuda, reference, _shapes,
)  # fmt: skip
