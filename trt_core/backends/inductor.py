"""Segments compiled by Inductor (`torch.compile`), weights as inputs, token axes dynamic."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import Backend
from ..errors import BuildFailed, first_line
from ..flux.catalogue import Axis, Segment
from ..flux.fused import load_kernels
from .base import Request

_COMPILE_THREADS = 1
"""Kernels are compiled in this process. Inductor's own number is one process per core, each with PyTorch and Triton in
memory: five held 0.78 GB beside FLUX.1-dev in FP8 (H100). A block has about ten kernels, each of 0.2 to 0.4 s and 55 MB
in all (measured: compute capability 9.0, on one core of an EPYC)."""

_COPIES = itertools.count()


def why_not_inductor(device: torch.device) -> str | None:
    """The reason why `torch.compile` cannot build here, or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Windows: pip install triton-windows)"
    if not any(shutil.which(name) for name in ("cc", "gcc", "g++", "clang", "cl")):
        return "no C compiler was found, which torch.compile needs"
    return None


class InductorSegment:
    """A segment compiled at its first call. One compilation serves every block and every number of tokens.

    Batch 1 and batch 2 or more are two compilations, because PyTorch specialises on sizes 0 and 1.
    """

    backend = Backend.INDUCTOR
    plan_bytes = 0

    def __init__(self, request: Request) -> None:
        self._segment = request.segment
        self._dynamic = _dynamic_axes(request.segment)
        self._seen: set[tuple[int, ...]] = set()
        load_kernels()
        # Now and not at the first call, which is in a thread that a cancel stops: half an import cannot be repeated.
        importlib.import_module("torch._inductor.compile_fx")
        function = _private_copy(request.segment.function, request.segment.name.value)
        self._compiled = torch.compile(function, fullgraph=True, options={"compile_threads": _COMPILE_THREADS})

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(tensors[0].shape)
        if shape in self._seen:
            return self._compiled(*tensors)
        self._mark_dynamic(tensors)
        try:
            out = self._compiled(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise BuildFailed(
                f"Inductor could not compile {self._segment.name.value}: {first_line(error)}",
                fix='Use backend="eager" or "tensorrt".',
                widget="backend",
            ) from error
        self._seen.add(shape)
        return out

    def close(self) -> None:
        del self._compiled

    def _mark_dynamic(self, tensors: tuple[Tensor, ...]) -> None:
        for index, dim in self._dynamic:
            if tensors[index].shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(tensors[index], dim)


def _dynamic_axes(segment: Segment) -> list[tuple[int, int]]:
    return [
        (index, dim)
        for index, argument in enumerate(segment.activations)
        for dim, axis in enumerate(argument.shape)
        if isinstance(axis, Axis)
    ]


def _private_copy(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with a code object, and a name, of its own.

    Dynamo counts recompilations per code object: two models of different sizes in one process would share one budget of
    eight. And it remembers sizes per file, line and name of the code: FP8's blocks of both kinds come from one line, so
    that after the first of them every axis of the other's weights counted as one that varies, and PyTorch 2.11 failed
    on a double block with a `KeyError`.
    """
    copied = types.FunctionType(
        function.__code__.replace(co_name=f"{name}_{next(_COPIES)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return copied
