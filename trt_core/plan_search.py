"""Finds the plan: builds the candidates, measures them on this GPU, keeps the fastest, remembers the choice."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .attention_ranking import rank_attention
from .backends.base import CompiledSegment
from .backends.compiler import SegmentCompiler
from .backends.tensorrt_builders import Builders
from .background import Stopwatch
from .candidates import first_segments, why_not
from .config import Attention, Backend, CompileConfig, Layout
from .engine_cache import EngineKey
from .errors import BuildFailed, CacheError, MissingDependency, OutOfMemory, TRTError
from .flux import cudnn_attention
from .flux.catalogue import SegmentName, source_version
from .host import stop_if_cancelled
from .measure import median_milliseconds
from .plan import (
    WHOLE_SEGMENT,
    AttentionChoice,
    BlockChoice,
    BlockKind,
    Measurement,
    Plan,
    choose,
    summary,
    why_not_whole_tensorrt,
)

_LOG = logging.getLogger("trt_core.plan")
_PLAN_FILE = "plan.json"
_BUILDER_PROCESSES = 2
"""Two halve the wait for four engines; each costs a CUDA context (0.5 GB) and a Python with torch_tensorrt (1 GB).
Beside Inductor one is enough: four engines take 25 s, Inductor's six segments 30 s."""

Compiled = dict[tuple[SegmentName, Backend], CompiledSegment]


@dataclass(slots=True)
class PlanSearch:
    """One search: what was compiled, how long it takes, and what was left out and why."""

    compiler: SegmentCompiler
    config: CompileConfig
    layout: Layout | None = None
    """None: both are candidates. Attention masks need `SPLIT`."""
    compiled: Compiled = field(default_factory=dict)
    milliseconds: dict[tuple[SegmentName, Backend], float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    attention: AttentionChoice = field(default_factory=lambda: AttentionChoice(Attention.AUTO, 0.0))
    """Ranked when the search begins."""

    def run(self) -> tuple[Plan, Compiled]:
        """The plan and the compiled segments it needs; everything else that was built is closed again.

        Raises `BuildCancelled`, `BuildFailed`, `MissingDependency` and `OutOfMemory`; then nothing is left behind.
        """
        try:
            plan = self._found_or_searched()
        except torch.OutOfMemoryError as error:
            self._close_all()
            raise OutOfMemory(
                "Out of GPU memory while compiling and measuring; the weights are untouched.",
                fix="Unload other models, or start with a smaller picture.",
            ) from error
        except BaseException:  # Ctrl-C too: what was built by then must not keep GPU memory
            self._close_all()
            raise
        needed = {(name, backend) for name, backend, _ in plan.needed()}
        for key in [key for key in self.compiled if key not in needed]:
            self.compiled.pop(key).close()
        self._free_cached()
        return plan, self.compiled

    def _free_cached(self) -> None:
        """What checks and measurements used: up to 1.5 GB for a full-size block, of other sizes for the next one."""
        if self.compiler.device.type == "cuda":
            torch.cuda.empty_cache()

    def _found_or_searched(self) -> Plan:
        """The remembered plan, else a new one; two processes that want the same one search once."""
        plan = self._remembered()
        if plan is not None and self._load(plan):
            return plan
        with self.compiler.cache.lock(self._key(), self.compiler.progress.cancelled):
            plan = self._remembered()
            return plan if plan is not None and self._load(plan) else self._search()

    def _close_all(self) -> None:
        while self.compiled:
            self.compiled.popitem()[1].close()
        self._free_cached()

    # -- a plan found before -------------------------------------------------------------------------------------

    def _key(self) -> EngineKey:
        arch, compiler = self.compiler.arch, self.compiler
        profile = compiler.profile
        ranges = {
            axis: [getattr(profile, axis).min, getattr(profile, axis).max]
            for axis in ("img_tokens", "txt_tokens", "batch")
        }
        fields = {
            "hidden": arch.hidden, "heads": arch.heads, "mlp_hidden": arch.mlp_hidden, "ranges": ranges,
            "opt": None if self.config.profile is None else profile.img_tokens.opt,
            "dtype": str(compiler.dtype), "source": source_version(), "backend": self.config.backend.value,
            "attention": self.config.attention.value, "layout": self.layout.value if self.layout else None,
            # A compiler that was installed since makes a new choice possible.
            "precision": [compiler.precision(WHOLE_SEGMENT[kind]).to_dict() for kind in BlockKind],
            "left_out": sorted(backend.value for backend, reason in why_not(self.compiler).items() if reason),
            "fp8_attention": cudnn_attention.installed(),
        }  # fmt: skip
        return EngineKey("plan", fields)

    def _remembered(self) -> Plan | None:
        entry = self.compiler.cache.get(self._key())
        if entry is None:
            return None
        try:
            return Plan.from_json(entry.read(_PLAN_FILE))
        except (ValueError, KeyError, TypeError, CacheError, TRTError) as error:
            _LOG.warning("The cached plan is not used: %s", error)
            return None

    def _load(self, plan: Plan) -> bool:
        """Compiles what a remembered plan needs; False where an engine is gone, so that the search runs again."""
        watch = Stopwatch()
        self.compiler.profile = plan.profile
        for done, (name, backend, attention) in enumerate(plan.needed()):
            self._progress("Loading the plan", done, len(plan.needed()))
            compiled = self._loaded(name, backend, attention)
            if compiled is None:
                return False
            self.compiled[name, backend] = compiled
        _LOG.info("plan from the cache (%s; %s), %.1f s", plan.double.words(), plan.single.words(), watch.seconds())
        return True

    def _loaded(self, name: SegmentName, backend: Backend, attention: Attention) -> CompiledSegment | None:
        if backend is Backend.TENSORRT:
            return self.compiler.from_cache(name)
        try:
            return self.compiler.compile(name, backend, attention)
        except BuildFailed as error:
            _LOG.warning("The remembered plan is searched anew: %s", error)
            return None

    # -- a new plan ----------------------------------------------------------------------------------------------

    def _search(self) -> Plan:
        watch = Stopwatch()
        self.attention, ranked = rank_attention(self.compiler, self.config.attention)
        self.measurements += ranked
        backends = self._backends()
        if Backend.TENSORRT in backends:
            self._build_with_tensorrt(backends)
        else:
            self._compile_others(backends)
        choices = self._choose()
        if self.config.backend is Backend.AUTO and Backend.TENSORRT in backends:
            choices = self._try_whole_tensorrt(choices)
        plan = Plan(
            choices[BlockKind.DOUBLE][0],
            choices[BlockKind.SINGLE][0],
            self.compiler.profile,
            tuple(self.measurements),
        )
        arch = self.compiler.arch
        depths = {BlockKind.DOUBLE: arch.double_depth, BlockKind.SINGLE: arch.single_depth}
        times = {kind: choices[kind][1] for kind in BlockKind}
        _LOG.info("plan %s, found in %.1f s", summary(plan, times, depths), watch.seconds())
        self._remember(plan)
        return plan

    def _backends(self) -> list[Backend]:
        """Candidates, each that cannot be built left out with its reason; a forced one that cannot raises."""
        device = self.compiler.device
        if self.config.backend is Backend.AUTO and device.type != "cuda":
            self._leave_out("all segments", Backend.INDUCTOR, 'no GPU; backend="inductor" compiles for the CPU')
            return [Backend.EAGER]
        reasons = why_not(self.compiler)
        wanted = list(reasons) if self.config.backend is Backend.AUTO else [self.config.backend]
        for backend in wanted:
            if reason := reasons[backend]:
                if self.config.backend is backend:
                    raise MissingDependency(
                        f'backend="{backend.value}" cannot be used here: {reason}.',
                        fix='Use backend="auto", which takes what this machine has.',
                        widget="backend",
                    )
                self._leave_out("all segments", backend, reason)
        return [backend for backend in wanted if reasons[backend] is None]

    def _wanted(self, backend: Backend) -> list[SegmentName]:
        halves_too = self.config.backend is Backend.AUTO and not self._only_inductor()
        return first_segments(backend, self.layout, halves_too)

    def _only_inductor(self) -> bool:
        """Whether TensorRT is left out: then Inductor's halves could only repeat its whole blocks."""
        return any(m.left_out and m.backend == Backend.TENSORRT.value for m in self.measurements)

    def _build_with_tensorrt(self, backends: list[Backend]) -> None:
        """TensorRT's engines in processes of their own, Inductor's segments meanwhile here."""
        names = self._wanted(Backend.TENSORRT)
        cached = {name: self.compiler.from_cache(name) for name in names}
        missing = [name for name in names if cached[name] is None]
        self.compiled.update({(n, Backend.TENSORRT): c for n, c in cached.items() if c is not None})
        self._with_builders(missing, lambda: self._compile_others(backends))
        for name in names:
            self._measure(name, Backend.TENSORRT)

    def _with_builders(self, names: list[SegmentName], meanwhile: object) -> None:
        if not names:
            if callable(meanwhile):
                meanwhile()
            return
        watch = Stopwatch()
        processes = min(1 if meanwhile and self.config.backend is Backend.AUTO else _BUILDER_PROCESSES, len(names))
        compiler = self.compiler
        with Builders(compiler.arch, compiler.device, processes, compiler.timing_cache()) as builders:
            tickets = {builders.submit(compiler.request(name)): name for name in _longest_first(names)}
            if callable(meanwhile):
                meanwhile()
            done = 0
            for ticket in builders.finished(list(tickets)):
                self._progress("TensorRT builds", done, len(names))
                if ticket >= 0:
                    done += 1
                    self._take(tickets[ticket], builders, ticket)
        _LOG.info("TensorRT built %d engines in %d processes, %.1f s", len(names), processes, watch.seconds())

    def _take(self, name: SegmentName, builders: Builders, ticket: int) -> None:
        try:
            plan = builders.result(ticket)
            if plan is not None:
                self.compiled[name, Backend.TENSORRT] = self.compiler.from_plan(name, plan)
                self._free_cached()
        except BuildFailed as error:
            self._failed(name, Backend.TENSORRT, error)

    def _compile_others(self, backends: list[Backend]) -> None:
        """Inductor's and eager's segments."""
        jobs = [(name, b) for b in (Backend.INDUCTOR, Backend.EAGER) if b in backends for name in self._wanted(b)]
        for done, (name, backend) in enumerate(jobs):
            self._progress(f"{backend.value} compiles {name.value}", done, len(jobs))
            try:
                self.compiled[name, backend] = self._compile_one(name, backend)
            except BuildFailed as error:
                self._failed(name, backend, error)
            self._free_cached()
        for name, backend in jobs:
            self._measure(name, backend)

    def _compile_one(self, name: SegmentName, backend: Backend) -> CompiledSegment:
        """Without FP8 attention inside where that is not exact enough."""
        kernel = self.attention.of(name, backend)
        try:
            return self.compiler.compile(name, backend, kernel)
        except BuildFailed as error:
            if kernel is self.attention.between:
                raise
            self._leave_out(f"{kernel.value} attention in {name.value}", backend, str(error))
            self.attention = self.attention.without(name.kind)
            return self.compiler.compile(name, backend, self.attention.between)

    def _measure(self, name: SegmentName, backend: Backend) -> None:
        """Times a segment at the profile's optimum; forced backends are not timed, there is nothing to choose."""
        compiled = self.compiled.get((name, backend))
        if compiled is None:
            return
        ms = 0.0
        if self.config.backend is Backend.AUTO:
            inputs = self.compiler.inputs(name, self.attention.of(name, backend))
            with torch.no_grad():
                ms = median_milliseconds(lambda: compiled(*inputs), self.compiler.device)
            del inputs
            self._free_cached()
        self.milliseconds[name, backend] = ms
        ratio = self.compiler.error_ratios.get((name, backend))
        self.measurements.append(Measurement(name.value, backend.value, ms or None, ratio))

    def _choose(self) -> dict[BlockKind, tuple[BlockChoice, float]]:
        return {kind: choose(kind, self.milliseconds, self.attention) for kind in BlockKind}

    def _try_whole_tensorrt(
        self, choices: dict[BlockKind, tuple[BlockChoice, float]]
    ) -> dict[BlockKind, tuple[BlockChoice, float]]:
        """Builds TensorRT's whole blocks where they can still win."""
        if self.layout is Layout.SPLIT:
            return choices
        names = []
        for kind in BlockKind:
            name = WHOLE_SEGMENT[kind]
            if reason := why_not_whole_tensorrt(kind, self.milliseconds, choices[kind][1]):
                self._leave_out(name.value, Backend.TENSORRT, reason)
            elif (found := self.compiler.from_cache(name)) is not None:
                self.compiled[name, Backend.TENSORRT] = found
            else:
                names.append(name)
        self._with_builders(names, None)
        for kind in BlockKind:
            self._measure(WHOLE_SEGMENT[kind], Backend.TENSORRT)
        return self._choose()

    def _remember(self, plan: Plan) -> None:
        info = {"double": plan.double.words(), "single": plan.single.words()}
        try:
            self.compiler.cache.put(self._key(), {_PLAN_FILE: plan.to_json()}, info)
        except CacheError as error:
            _LOG.warning("The plan works but is not kept: %s", error)

    def _failed(self, name: SegmentName, backend: Backend, error: BuildFailed) -> None:
        if self.config.backend is backend:
            raise error
        _LOG.warning("%s leaves out %s: %s", backend.value, name.value, error)
        self._leave_out(name.value, backend, str(error))

    def _leave_out(self, what: str, backend: Backend, reason: str) -> None:
        _LOG.info("%s is left out for %s: %s", backend.value, what, reason)
        self.measurements.append(Measurement(what, backend.value, left_out=reason))

    def _progress(self, stage: str, done: int, total: int) -> None:
        stop_if_cancelled(self.compiler.progress, stage)
        self.compiler.progress.update(stage, done, total)


def _longest_first(names: Iterable[SegmentName]) -> list[SegmentName]:
    """Double blocks take twice as long to build as single ones: they come first, so that two processes end together."""
    return sorted(names, key=lambda name: name.value)
