"""Segments compiled by Inductor (`torch.compile`), weights as inputs, token axes dynamic."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import Backend, ShapeRange
from ..errors import BuildFailed, first_line
from ..flux.catalogue import Axis, Segment
from ..flux.fused import load_kernels
from .base import Request
from .check import bounded, error_ratio
from .inductor_code import Code, CompiledAtCalls, KeptCode, NotAheadError, compile_ahead, mark_dynamic, why_not_ahead

_LOG = logging.getLogger("trt_core.build")

_COMPILE_THREADS = 1
"""Kernels are compiled in this process. Inductor's own number is one process per core, each with PyTorch and Triton in
memory: five held 0.78 GB beside FLUX.1-dev in FP8 (H100). A block has about ten kernels, each of 0.2 to 0.4 s and 55 MB
in all (measured: compute capability 9.0, on one core of an EPYC)."""

_OTHERS = 'Use backend="eager" or "tensorrt".'

_COPIES = itertools.count()


def why_not_inductor(device: torch.device) -> str | None:
    """The reason why `torch.compile` cannot build here, or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Windows: pip install triton-windows)"
    if not any(shutil.which(name) for name in ("cc", "gcc", "g++", "clang", "cl")):
        return "no C compiler was found, which torch.compile needs"
    return None


class InductorSegment:
    """A segment compiled at its first call, or read from the cache. One code serves every block and number of tokens.

    Batch 1 and batch 2 or more are two codes, because PyTorch specialises on sizes 0 and 1.
    """

    backend = Backend.INDUCTOR

    def __init__(self, request: Request, kept: KeptCode | None = None) -> None:
        """`kept`: where this segment's code is kept; None compiles it anew in every process."""
        # Without its weights: a segment outlives what was bound when it was made.
        self._request, self._segment, self._kept = replace(request, weights=()), request.segment, kept
        self._dynamic = _dynamic_axes(request.segment)
        load_kernels()
        # Now and not at the first call, which is in a thread that a cancel stops: half an import cannot be repeated.
        importlib.import_module("torch._inductor.compile_fx")
        function = _private_copy(request.segment.function, request.segment.name.value)
        with torch._dynamo.config.patch(enable_aot_compile=True):  # 2.11 asks for it here, 2.13 not any more
            self._compiled = torch.compile(function, fullgraph=True, options={"compile_threads": _COMPILE_THREADS})
        self._why_not_ahead = why_not_ahead()
        self._codes: list[Code] = []
        self._checked = False
        """Whether what is stored is what was checked."""
        self._unread: Iterator[Code] = kept.read() if kept and self._why_not_ahead is None else iter(())

    @property
    def plan_bytes(self) -> int:
        """Of the code in the engine cache."""
        return self._kept.size_bytes if self._kept else 0

    def read(self) -> float | None:
        """The error ratio of the code in the cache, from when it was checked; None where there is none to be read."""
        self._codes.extend(itertools.islice(self._unread, 1))
        self._checked = bool(self._codes)
        return self._kept.error_ratio if self._kept and self._checked else None

    def keep(self, error_ratio: float) -> None:
        """Stores what is compiled, now that it was checked; what other inputs will need is checked and stored then."""
        if self._kept and self._why_not_ahead is None:
            self._kept.store(self._codes, error_ratio)
            self._checked = True

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for code in self._codes:
            if code.guard_check(*tensors):
                return code.fn(*tensors)
        return self._another_code(tensors).fn(*tensors)

    def close(self) -> None:
        self._codes.clear()
        del self._compiled

    def _another_code(self, tensors: tuple[Tensor, ...]) -> Code:
        for code in self._unread:
            self._codes.append(code)
            if code.guard_check(*tensors):
                return code
        code = self._new_code(tensors)
        self._codes.append(code)
        if self._kept and self._checked and self._why_not_ahead is None:
            self._check_like(tensors, code, self._kept.error_ratio_bound)
            self._kept.add(code)
        return code

    def _check_like(self, tensors: tuple[Tensor, ...], code: Code, bound: float) -> None:
        """Raises `BuildFailed` where `code`, made for these inputs, is off by more than `bound`. It goes then, as it
        does when the check is cancelled."""
        batch, weights = tensors[0].shape[0], tensors[len(self._segment.activations) :]
        profile = replace(self._request.profile, batch=ShapeRange(batch, batch, batch))
        try:
            ratio = error_ratio(self, replace(self._request, profile=profile, weights=weights))
            bounded(ratio, bound, f"Inductor's {self._segment.name.value} for batch {batch}", _OTHERS, "backend")
        except BaseException:
            self._codes = [other for other in self._codes if other is not code]
            raise

    def _new_code(self, tensors: tuple[Tensor, ...]) -> Code:
        if self._why_not_ahead is None:
            mark_dynamic(tensors, self._dynamic)
            try:
                with self._failing_by_name():
                    return compile_ahead(self._compiled, tensors)
            except NotAheadError as error:
                self._why_not_ahead = str(error)
        _LOG.info("%s is compiled in each process: %s", self._segment.name.value, self._why_not_ahead)
        return CompiledAtCalls(self._compiled, self._dynamic, self._failing_by_name)

    @contextmanager
    def _failing_by_name(self) -> Iterator[None]:
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            raise BuildFailed(
                f"Inductor could not compile {self._segment.name.value}: {first_line(error)}",
                fix=_OTHERS,
                widget="backend",
            ) from error


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
