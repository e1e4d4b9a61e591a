"""Segments compiled by TensorRT, weights as engine inputs: built through Torch-TensorRT, run by our own runtime."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Backend
from ..errors import BuildFailed, OutOfMemory
from ..flux.catalogue import Axis, Segment, axis_range
from . import tensorrt_api, tensorrt_fp8
from .base import Request

_LOG = logging.getLogger("trt_core.tensorrt")

_LARGEST_AXIS = 2**20
"""Export's own bound on token and batch axes; the profile's range is what the engine gets."""


class Scratch:
    """One block of GPU memory that all contexts of a module share; segments run one after the other on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def at_least(self, size_bytes: int) -> int:
        """The buffer's address, grown to `size_bytes` where it is smaller."""
        if self._buffer.numel() < size_bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        return self._buffer.data_ptr()


def build_plan(request: Request, timing_cache: str) -> bytes:
    """Plan bytes of a segment whose activations and weights are all inputs. Raises `BuildFailed`, `OutOfMemory`."""
    started = time.perf_counter()
    if request.precision.fp8:
        tensorrt_fp8.register_converters()
    try:
        plan = tensorrt_api.serialized_engine(export(request), _inputs(request), request.device, timing_cache)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"Out of GPU memory while building {request.segment.name.value}.",
            fix="Close other programs that use the GPU, or lower the profile's largest size.",
        ) from error
    _LOG.debug("built %s: %d bytes, %.1f s", request.segment.name.value, len(plan), time.perf_counter() - started)
    return plan


def export(request: Request) -> torch.export.ExportedProgram:
    """The segment as an exported program with named dynamic axes."""
    segment = request.segment
    # Sizes that differ from each other and from 1, so that export cannot take two axes for one or specialise on 1.
    # Fake tensors: nothing is computed and nothing is allocated.
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        example = segment.random_inputs(2, 80, 48, request.dtype, request.device)
    dims = {axis: torch.export.Dim(axis.value, min=1, max=_LARGEST_AXIS) for axis in Axis}
    shapes: list[dict[int, Any] | None] = [
        {dim: dims[axis] for dim, axis in enumerate(argument.shape) if isinstance(axis, Axis)}
        for argument in segment.activations
    ]
    shapes += [None] * len(segment.weights)
    with torch.no_grad():
        return torch.export.export(
            _Module(segment), tuple(example), dynamic_shapes={"tensors": tuple(shapes)}, strict=False
        )


class _Module(nn.Module):
    """torch.export wants a module."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self._function = segment.function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._function(*tensors)


def _inputs(request: Request) -> list[Any]:
    segment, profile = request.segment, request.profile
    inputs = []
    for argument in segment.activations:
        ranges = [axis_range(profile, d) if isinstance(d, Axis) else None for d in argument.shape]
        low, opt, high = (
            [d if r is None else getattr(r, bound) for d, r in zip(argument.shape, ranges, strict=True)]
            for bound in ("min", "opt", "max")
        )
        dtype = torch.float32 if argument.fp32 else request.dtype
        inputs.append(tensorrt_api.dynamic_input(low, opt, high, dtype, argument.name))
    for weight in segment.weights:
        shape, dtype = weight.shape, tensorrt_fp8.input_dtype(weight.dtype or request.dtype)
        inputs.append(tensorrt_api.dynamic_input(shape, shape, shape, dtype, weight.name.replace(".", "_")))
    return inputs


class TensorRTSegment:
    """An engine and its context. Addresses are bound per call, so one engine serves every block and every weight."""

    backend = Backend.TENSORRT

    def __init__(
        self,
        request: Request,
        plan: bytes,
        runtime: Any,
        scratch: Scratch,
        runtime_cache: bytes | None = None,
    ) -> None:
        trt = tensorrt_api.load_tensorrt()
        self.plan_bytes = len(plan)
        self._segment, self._device, self._scratch = request.segment, request.device, scratch
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BuildFailed(f"TensorRT cannot read the plan of {request.segment.name.value}.", fix="Clear the cache.")
        self._context, self._runtime_cache = tensorrt_api.create_context(trt, self._engine, runtime_cache)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {n: self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names}
        self._inputs = _in_argument_order([n for n in names if is_input[n]])
        self._outputs = [n for n in names if not is_input[n]]
        self._output_dtype = request.dtype
        self._shapes: tuple[torch.Size, ...] = ()
        self._output_shapes: list[tuple[int, ...]] = []
        self._scratch_bytes = 0

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self._segment.activations)
        activations = [t if t.is_contiguous() else t.contiguous() for t in tensors[:count]]
        shapes = tuple(t.shape for t in activations)
        if shapes != self._shapes:
            self._set_shapes(shapes)
        context = self._context
        for name, tensor in zip(self._inputs, (*activations, *tensors[count:]), strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = tuple(
            torch.empty(shape, dtype=self._output_dtype, device=self._device) for shape in self._output_shapes
        )
        for name, tensor in zip(self._outputs, outputs, strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        context.set_device_memory(self._scratch.at_least(self._scratch_bytes), self._scratch_bytes)
        if not context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise BuildFailed(f"TensorRT failed to run {self._segment.name.value}; the log has its message.")
        return outputs

    def runtime_cache(self) -> bytes | None:
        """Kernels that TensorRT-RTX compiled so far, to be stored beside the plan; None for standard TensorRT."""
        if self._runtime_cache is None:
            return None
        memory = self._runtime_cache.serialize()
        return bytes(memory) if memory is not None else None

    def close(self) -> None:
        del self._context, self._engine, self._runtime_cache

    def _set_shapes(self, shapes: tuple[torch.Size, ...]) -> None:
        for name, shape in zip(self._inputs, shapes, strict=False):
            if not self._context.set_input_shape(name, tuple(shape)):
                raise BuildFailed(f"{self._segment.name.value} does not take {name} of shape {tuple(shape)}.")
        self._output_shapes = [tuple(self._context.get_tensor_shape(name)) for name in self._outputs]
        self._scratch_bytes = self._context.update_device_memory_size_for_shapes()
        self._shapes = shapes


def _in_argument_order(names: Sequence[str]) -> list[str]:
    """Engine inputs in the order of the function's arguments: export names them tensors_0, tensors_1, ..."""
    return sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))
