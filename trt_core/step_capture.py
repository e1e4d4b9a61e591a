"""How a step becomes a CUDA graph: captured once, then launched again with other inputs in the same buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .step import StepInputs

StepFunction = Callable[[StepInputs], Tensor]
_REFUSED: list[torch.cuda.CUDAGraph] = []
"""Graphs that CUDA did not let end: PyTorch's allocator for host memory may ask them as long as the process runs."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedStep:
    """A step's launches, the buffers that they read and the one that they write. `kept`: what else they use."""

    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    output: Tensor
    done: torch.cuda.Event
    kept: object

    def __call__(self, inputs: StepInputs) -> Tensor:
        """The step's output for these inputs, a tensor of its own."""
        stream = torch.cuda.current_stream(self.output.device)
        stream.wait_event(self.done)  # the replay before, of this graph or another, may be on another stream
        for buffer, given in zip(self.inputs.tensors, inputs.tensors, strict=True):
            buffer.copy_(given)
        self.graph.replay()
        output = self.output.clone()
        self.done.record(stream)
        return output


class GraphMemory:
    """What all captured steps of one module share: a private memory pool, the stream of the captures, and an order.

    Between replays nothing in the pool is needed: a replay begins by writing what it reads, its output is copied out,
    and `done` lets none begin before the one before has ended. So graphs may lie over each other, and several sizes
    take as much as the largest of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self._pool = torch.cuda.graph_pool_handle()
        # One stream: the allocator hands a freed block on to captures on the same stream only. Above the usual
        # priority: its kernels get the multiprocessors before those that run beside them (`flux.side_stream`).
        self._stream = torch.cuda.Stream(self._device, priority=-1)
        self._done = torch.cuda.Event()
        self.bytes = 0

    def capture(self, step: StepFunction, inputs: StepInputs, kept: object = None) -> CapturedStep:
        """The step as a graph; nothing has run yet. Raises `RuntimeError` where CUDA refuses or memory is short, and
        leaves everything usable."""
        with torch.cuda.device(self._device):
            buffers = inputs.cloned()
            # The activations of earlier runs are cached: the graph's own would lie beside them, about 1 GB.
            self._give_back_cached()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            try:
                output = self._captured(graph, step, buffers)
            finally:
                self._give_back_cached()
            self.bytes += torch.cuda.memory_reserved() - before
        return CapturedStep(graph, buffers, output, self._done, kept)

    def wait(self) -> None:
        """Until the last replay has ended: before graphs and their buffers go."""
        self._done.synchronize()

    def close(self) -> None:
        """Gives the memory back to the GPU, once all graphs are gone."""
        with torch.cuda.device(self._device):
            self._give_back_cached()

    def _captured(self, graph: torch.cuda.CUDAGraph, step: StepFunction, inputs: StepInputs) -> Tensor:
        # Not `torch.cuda.graph(...)`: it leaves its own stream the current one where a capture cannot be ended.
        with torch.cuda.stream(self._stream):
            try:
                # "thread_local": what other threads do meanwhile, such as pinning memory, does no harm.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                return step(inputs)
            finally:
                self._end(graph)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._repair(graph)
            raise

    def _repair(self, graph: torch.cuda.CUDAGraph) -> None:
        """PyTorch's allocator and random numbers still believe in a capture that CUDA did not let end."""
        with contextlib.suppress(RuntimeError):  # it had ended for the allocator
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        graph.reset()
        _REFUSED.append(graph)
        random = torch.cuda.default_generators[self._device.index]
        random.graphsafe_set_state(random.clone_state())

    def _give_back_cached(self) -> None:
        """Also cuBLAS's workspaces: one made in a capture lies in the pool and would keep its block from being freed,
        and one made before a capture could be freed while the graph uses it. PyTorch's own graphs do the same."""
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
