"""Candidate segments of a search: compiled, timed on this device, or left out with the reason."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch

from .backends.base import CompiledSegment
from .backends.compiler import SegmentCompiler
from .config import Attention, Backend, CompileConfig
from .errors import BuildFailed
from .flux.catalogue import SegmentName
from .host import stop_if_cancelled
from .measure import median_milliseconds
from .plan import AttentionChoice, Measurement

_LOG = logging.getLogger("trt_core.plan")

Job = tuple[SegmentName, Backend]


@dataclass(slots=True)
class Trials:
    """What was compiled so far, how long it takes, and what was left out and why."""

    compiler: SegmentCompiler
    config: CompileConfig
    attention: AttentionChoice = field(default_factory=lambda: AttentionChoice(Attention.AUTO, 0.0))
    """Ranked when the search begins."""
    compiled: dict[Job, CompiledSegment] = field(default_factory=dict)
    milliseconds: dict[Job, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    products: dict[SegmentName, float] = field(default_factory=dict)
    """What matrix products alone take, of segments for which that was asked."""

    def compile(self, jobs: Sequence[Job]) -> None:
        """Inductor's and eager's segments."""
        for done, (name, backend) in enumerate(jobs):
            self.progress(f"{backend.value} compiles {name.value}", done, len(jobs))
            try:
                self.compiled[name, backend] = self.compile_one(name, backend)
            except BuildFailed as error:
                self._failed(name, backend, error)
            self.free_cached()

    def compile_one(self, name: SegmentName, backend: Backend) -> CompiledSegment:
        """Without FP8 attention inside where that is not exact enough."""
        kernel = self.attention.of(name, backend)
        try:
            return self.compiler.compile(name, backend, kernel)
        except BuildFailed as error:
            if kernel is self.attention.between:
                raise
            self.leave_out(f"{kernel.value} attention in {name.value}", backend, str(error))
            self.attention = self.attention.without(name.kind)
            return self.compiler.compile(name, backend, self.attention.between)

    def not_cached(self, names: Sequence[SegmentName]) -> list[SegmentName]:
        """Those whose TensorRT engine must be built; the others are loaded."""
        found = {name: self.compiler.from_cache(name) for name in names}
        self.compiled.update({(n, Backend.TENSORRT): segment for n, segment in found.items() if segment is not None})
        return [name for name in names if found[name] is None]

    def take(self, name: SegmentName, plan: bytes | BuildFailed) -> None:
        """Loads a TensorRT plan that was built."""
        self.progress(f"TensorRT loads {name.value}", 0, 1)
        try:
            if isinstance(plan, BuildFailed):
                raise plan
            self.compiled[name, Backend.TENSORRT] = self.compiler.from_plan(name, plan)
        except BuildFailed as error:
            self._failed(name, Backend.TENSORRT, error)
        self.free_cached()

    def measure(self, jobs: Sequence[Job]) -> None:
        """Times segments at the profile's optimum; forced backends are not timed, there is nothing to choose."""
        for name, backend in jobs:
            if (name, backend) in self.compiled:
                timed = self._timed(name, backend) if self.config.backend is Backend.AUTO else 0.0
                self.free_cached()
                self.milliseconds[name, backend] = timed
                ratio = self.compiler.error_ratios.get((name, backend))
                self.measurements.append(Measurement(name.value, backend.value, timed or None, ratio))

    def _timed(self, name: SegmentName, backend: Backend) -> float:
        compiled = self.compiled[name, backend]
        inputs = self.compiler.inputs(name, self.attention.of(name, backend))
        with torch.no_grad():
            return median_milliseconds(lambda: compiled(*inputs), self.compiler.device)

    def products_milliseconds(self, name: SegmentName) -> float:
        """What the segment's matrix products alone take, timed when it is first asked."""
        if name not in self.products:
            self.products[name] = self.compiler.products_milliseconds(name)
            self.free_cached()
        return self.products[name]

    def leave_out(self, what: str, backend: Backend, reason: str) -> None:
        _LOG.info("%s is left out for %s: %s", backend.value, what, reason)
        self.measurements.append(Measurement(what, backend.value, left_out=reason))

    def progress(self, stage: str, done: int, total: int) -> None:
        stop_if_cancelled(self.compiler.progress, stage)
        self.compiler.progress.update(stage, done, total)

    def free_cached(self) -> None:
        """What checks and measurements used: up to 1.5 GB for a full-size block, of other sizes for the next one."""
        if self.compiler.device.type == "cuda":
            torch.cuda.empty_cache()

    def close_all_but(self, needed: Container[Job]) -> None:
        for key in [key for key in self.compiled if key not in needed]:
            self.compiled.pop(key).close()
        self.free_cached()

    def _failed(self, name: SegmentName, backend: Backend, error: BuildFailed) -> None:
        if self.config.backend is backend:
            raise error
        _LOG.warning("%s leaves out %s: %s", backend.value, name.value, error)
        self.leave_out(name.value, backend, str(error))
