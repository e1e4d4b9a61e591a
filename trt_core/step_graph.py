"""CUDA graphs of whole steps: one launch in place of a thousand, so that the GPU never waits for Python.

Measured on an H100 at 1024 px: a step in bf16 takes 128 ms, of which no kernel runs for 2.6 ms, and Python works for 32
to 49 ms; on a slower CPU the GPU waits for it.

A graph holds addresses. Weights are bound by address and a refit writes in place, so a captured graph stays valid when
LoRAs change. It does not when other tensors are bound or blocks are compiled anew: then all graphs go.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .background import Stopwatch
from .config import Attention, Backend
from .errors import first_line
from .extras import Extras
from .flux import cudnn_attention
from .plan import BlockChoice
from .step import Step, StepInputs
from .step_capture import CapturedStep, GraphMemory

_LOG = logging.getLogger("trt_core.module")
EAGER_CALLS = 2
"""Runs of a size before its capture, in which all that is made at first use is made: Inductor's code for this batch,
Triton's kernels, cuDNN's graphs, cuBLAS's handles. A size that is used once or twice costs nothing."""
MOST_GRAPHS = 4
USED = "cuda graph"
_FAILED: list[str] = []
"""Why a capture failed in this process, if one did. There is no second one: PyTorch 2.11's allocators refuse every
later capture (seen on an H100, "already recording to mempool_id"), while everything else goes on as before."""


class StepGraphs:
    """The captured steps of one module, by the inputs' sizes; the one not used for longest goes first."""

    def __init__(self, memory: Callable[[torch.device], GraphMemory] = GraphMemory) -> None:
        self.words = ""
        """What the last step was: `USED`, or why it was none."""
        self._make_memory = memory
        self._memory: GraphMemory | None = None
        self._owner: tuple[object, ...] = ()
        self._graphs: OrderedDict[Hashable, CapturedStep] = OrderedDict()
        self._runs: Counter[Hashable] = Counter()
        self._lock = threading.RLock()  # two threads must not write one graph's inputs

    def run(
        self, step: Step, inputs: StepInputs, owner: tuple[object, ...], choices: Sequence[BlockChoice],
        why_not: str | None,
    ) -> Tensor:  # fmt: skip
        """The step's output, from its graph where there is one, which is captured now where it is time.

        `owner`: what the launches belong to beside the inputs, compared by identity or value; with another one all
        graphs go. `why_not`: the reason why this step cannot be a graph.
        """
        with self._lock:
            self._belong_to(owner)
            graph = self._graph(step, inputs, choices) if why_not is None else None
            self.words = USED if graph is not None else f"no cuda graph: {why_not or _why_not_yet()}"
            if graph is not None:
                return graph(inputs)
        return self._plain(step, inputs)

    def drop(self) -> bool:
        """Lets go of all graphs and gives their memory back to the GPU; whether there were any."""
        with self._lock:
            self._runs.clear()
            memory, self._memory = self._memory, None
            if memory is None:
                return False
            memory.wait()
            self._graphs.clear()
            memory.close()
            return True

    def _belong_to(self, owner: tuple[object, ...]) -> None:
        if owner != self._owner:
            self.drop()
            self._owner = owner

    def _graph(self, step: Step, inputs: StepInputs, choices: Sequence[BlockChoice]) -> CapturedStep | None:
        key = key_of(inputs)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._runs[key] += 1
        if self._runs[key] <= EAGER_CALLS or _FAILED:
            return None
        return self._capture(key, step, inputs, choices)

    def _capture(
        self, key: Hashable, step: Step, inputs: StepInputs, choices: Sequence[BlockChoice]
    ) -> CapturedStep | None:
        watch = Stopwatch()
        self._make_room()
        memory = self._memory = self._memory or self._make_memory(inputs.img.device)
        try:
            graph = memory.capture(step, inputs, _attention_memory(step, inputs, choices))
        except RuntimeError as error:  # CUDA's refusals and lack of memory; the step itself says what else is wrong
            _FAILED.append(f"a capture failed: {first_line(error.__context__ or error)}")
        if _FAILED:
            self.drop()  # only now: the error held what the capture had taken
            _LOG.warning("steps run without CUDA graphs from now on: %s", _FAILED[0])
            return None
        self._graphs[key] = graph
        size = f"{inputs.img.shape[1]} image tokens, {inputs.txt.shape[1]} text tokens, batch {inputs.img.shape[0]}"
        _LOG.info("step captured as a CUDA graph: %s, %.2f s, pool of %d bytes", size, watch.seconds(), memory.bytes)
        return graph

    def _make_room(self) -> None:
        while len(self._graphs) >= MOST_GRAPHS and self._memory is not None:
            self._memory.wait()
            self._graphs.popitem(last=False)

    def _plain(self, step: Step, inputs: StepInputs) -> Tensor:
        """The step as it is; without the memory of graphs where there is not enough."""
        try:
            return step(inputs)
        except torch.OutOfMemoryError:
            if not self.drop():
                raise
        return step(inputs)


def key_of(inputs: StepInputs) -> Hashable:
    """All that the launches of a step depend on, for one binding: equal keys may share a graph."""
    tensors = (None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    return torch.is_inference_mode_enabled(), *tensors


def why_not_graph(
    inputs: StepInputs, extras: Extras, device: torch.device, choices: Sequence[BlockChoice], *, wanted: bool,
    watched: bool,
) -> str | None:  # fmt: skip
    """Why this step cannot be a graph, or None. `watched`: the range check looks at blocks as they run."""
    found = (
        (not wanted, "cuda_graph=False"),
        (device.type != "cuda", "the model is not on a GPU"),
        (_adds(extras), "residuals, a mask or blocks of somebody else belong to this step"),
        (watched, "ranges of static FP8 scales are looked at in this step"),
        # All segments share one scratch buffer, which moves when it grows for a larger size; the graph has its address.
        (any(Backend.TENSORRT in choice.backends for choice in choices), "TensorRT's segments move their memory"),
        (any(t.device != device for t in inputs.tensors), "an input is on another device"),
    )
    return next((reason for applies, reason in found if applies), None) or _why_not_now()


def _why_not_yet() -> str:
    return _FAILED[0] if _FAILED else f"sizes like these ran less than {EAGER_CALLS + 1} times"


def _adds(extras: Extras) -> bool:
    residuals = (*extras.double_residuals, *extras.single_residuals)
    replaced = extras.double_overrides or extras.single_overrides
    return bool(replaced) or extras.mask is not None or any(r is not None for r in residuals)


def _why_not_now() -> str | None:
    """What somebody else is doing around this call: a graph would hide it from them, or them from it."""
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return "this call is being traced"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    return "another capture is under way" if torch.cuda.is_current_stream_capturing() else None


def _attention_memory(step: Step, inputs: StepInputs, choices: Sequence[BlockChoice]) -> object:
    """cuDNN's graph of FP8 attention with its workspace and scales, which the launches read: `cudnn_attention` itself
    keeps those of the last sizes only, and a replay does not count as a use."""
    if all(choice.attention is not Attention.FP8 for choice in choices):
        return None
    batch, tokens = inputs.img.shape[0], inputs.txt.shape[1] + inputs.img.shape[1]
    return cudnn_attention.graph_of(inputs.img.device.index, batch, tokens, step.arch.heads, step.arch.head_dim)
