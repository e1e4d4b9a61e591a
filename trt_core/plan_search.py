"""Finds the plan: builds the candidates that can win, measures them on this GPU, keeps the fastest, remembers it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from .attention_ranking import rank_attention
from .backends.base import CompiledSegment
from .backends.compiler import SegmentCompiler
from .background import Stopwatch
from .candidates import first_segments, halves, second_halves, why_not
from .config import Attention, Backend, CompileConfig, Layout
from .engine_builds import build_plans
from .errors import BuildFailed, MissingDependency, OutOfMemory
from .flux.catalogue import SPLIT_SEGMENTS, BlockKind, SegmentName
from .flux.cublaslt_kernels import prefer
from .heap import give_back_heap
from .kernel_ranking import rank_kernels
from .plan import (
    WHOLE_SEGMENT,
    BlockChoice,
    KernelChoice,
    Plan,
    choose,
    summary,
    why_not_inductor_half,
    why_not_second_half,
    why_not_whole_tensorrt,
)
from .plan_store import PlanStore
from .product_ranking import rank_products
from .trials import Job, Trials

_LOG = logging.getLogger("trt_core.plan")
_BUILDER_PROCESSES = 2
"""Two halve the wait for four engines; each costs a CUDA context (0.5 GB) and a Python with torch_tensorrt (1 GB).
Beside Inductor one is enough: it takes 25 s for four engines, of which it builds two, Inductor 12 s for its blocks."""

Compiled = dict[Job, CompiledSegment]
Choices = dict[BlockKind, tuple[BlockChoice, float]]


@dataclass(slots=True)
class PlanSearch:
    """One search for the plan of one model's blocks."""

    compiler: SegmentCompiler
    config: CompileConfig
    layout: Layout | None = None
    """None: both are candidates. Attention masks need `SPLIT`."""
    kernels: tuple[KernelChoice, ...] = field(default=(), init=False)
    trials: Trials = field(init=False)
    store: PlanStore = field(init=False)

    def __post_init__(self) -> None:
        self.trials = Trials(self.compiler, self.config)
        self.store = PlanStore(self.compiler, self.config, self.layout)

    def run(self) -> tuple[Plan, Compiled]:
        """The plan and the compiled segments it needs; everything else that was built is closed again.

        Raises `BuildCancelled`, `BuildFailed`, `MissingDependency` and `OutOfMemory`; then nothing is left behind.
        """
        needed: set[Job] = set()
        try:
            plan = self._found_or_searched()
            needed = {(name, backend) for name, backend, _ in plan.needed()}
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "Out of GPU memory while compiling and measuring; the weights are untouched.",
                fix="Unload other models, or start with a smaller picture.",
            ) from error
        finally:  # after Ctrl-C too: what was built by then must not keep memory
            self.trials.close_all_but(needed)
            give_back_heap()
        return plan, self.trials.compiled

    def _found_or_searched(self) -> Plan:
        """The remembered plan, else a new one; two processes that want the same one search once."""
        plan = self.store.remembered()
        if plan is not None and self._load(plan):
            return plan
        with self.store.lock():
            plan = self.store.remembered()
            return plan if plan is not None and self._load(plan) else self._search()

    # -- a plan found before -------------------------------------------------------------------------------------

    def _load(self, plan: Plan) -> bool:
        """Compiles what a remembered plan needs; False where an engine is gone, so that the search runs again."""
        watch = Stopwatch()
        self.compiler.profile = plan.profile
        self.compiler.wide = frozenset(kind for kind in BlockKind if plan.choice(kind).wide)
        self._take_kernels(plan.kernels)
        for done, (name, backend, attention) in enumerate(plan.needed()):
            self.trials.progress("Loading the plan", done, len(plan.needed()))
            compiled = self._loaded(name, backend, attention)
            if compiled is None:
                return False
            self.trials.compiled[name, backend] = compiled
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
        backends = self._backends()
        postponed = self._try_first(backends)
        if self._both_layouts and Backend.TENSORRT in backends:
            hopeless = self._try_second_halves(postponed)
            if Backend.INDUCTOR in backends:
                self._try_inductor_halves()
            self._try_whole_tensorrt(hopeless)
        choices = self._choose()
        plan = Plan(
            choices[BlockKind.DOUBLE][0],
            choices[BlockKind.SINGLE][0],
            self.compiler.profile,
            tuple(self.trials.measurements),
            self.kernels,
        )
        _LOG.info("plan %s, found in %.1f s", self._summary(plan, choices), watch.seconds())
        self.store.remember(plan)
        return plan

    @property
    def _both_layouts(self) -> bool:
        """Whether blocks may be whole or split, whichever is faster."""
        return self.config.backend is Backend.AUTO and self.layout is None

    def _summary(self, plan: Plan, choices: Choices) -> str:
        arch = self.compiler.arch
        depths = {BlockKind.DOUBLE: arch.double_depth, BlockKind.SINGLE: arch.single_depth}
        return summary(plan, {kind: choices[kind][1] for kind in BlockKind}, depths)

    def _backends(self) -> list[Backend]:
        """Candidates, each that cannot be built left out with its reason; a forced one that cannot raises."""
        device = self.compiler.device
        if self.config.backend is Backend.AUTO and device.type != "cuda":
            self.trials.leave_out("all segments", Backend.INDUCTOR, 'no GPU; backend="inductor" compiles for the CPU')
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
                self.trials.leave_out("all segments", backend, reason)
        return [backend for backend in wanted if reasons[backend] is None]

    def _try_first(self, backends: list[Backend]) -> list[SegmentName]:
        """TensorRT's engines that are not built yet: what is measured here decides about them.

        The others are built in processes of their own, what is not TensorRT's is compiled meanwhile here. Measured when
        the builders have ended: nothing else uses the GPU then.
        """
        jobs = {b: [(name, b) for name in first_segments(b, self.layout)] for b in backends}
        others = [job for b in (Backend.INDUCTOR, Backend.EAGER) for job in jobs.get(b, [])]
        engines = [name for name, _ in jobs.get(Backend.TENSORRT, [])]
        missing = self.trials.not_cached(engines)
        postponed = self._postponed(missing, backends)
        building = [name for name in missing if name not in postponed]
        self._build(building, self._processes(), lambda: self._beside_builders(others))
        self.trials.measure([*others, *jobs.get(Backend.TENSORRT, [])])
        return postponed

    def _postponed(self, missing: list[SegmentName], backends: list[Backend]) -> list[SegmentName]:
        """Second halves among the `missing` engines, where Inductor's whole blocks are there to be beaten.

        One in the cache is not missing: it is loaded and measured at once, as that costs no build.
        """
        if not self._both_layouts or Backend.INDUCTOR not in backends:
            return []
        return [name for name in missing if name in second_halves()]

    def _build(self, names: Sequence[SegmentName], processes: int, meanwhile: Callable[[], None]) -> None:
        """TensorRT's engines, loaded when the builders have ended, as is TensorRT itself: both would be in memory."""
        for name, plan in build_plans(self.compiler, names, processes, meanwhile).items():
            self.trials.take(name, plan)

    def _beside_builders(self, jobs: list[Job]) -> None:
        self.trials.attention, ranked = rank_attention(self.compiler, self.config.attention)
        self.compiler.wide, products = rank_products(self.compiler)
        self.trials.measurements += [*ranked, *products]
        if any(backend is Backend.INDUCTOR for _, backend in jobs):
            kernels, measured = rank_kernels(self.compiler, self.trials.attention.between)
            self.trials.measurements += measured
            self._take_kernels(kernels)
        self.trials.compile(jobs)

    def _take_kernels(self, kernels: tuple[KernelChoice, ...]) -> None:
        """Before anything is compiled or measured: blocks are timed with the kernels that they will have."""
        self.kernels = kernels
        if kernels:
            prefer(self.compiler.device.index or 0, {choice.product: choice.kernel for choice in kernels})

    def _processes(self) -> int:
        return 1 if self.config.backend is Backend.AUTO else _BUILDER_PROCESSES

    def _choose(self) -> Choices:
        return {
            kind: choose(kind, self.trials.milliseconds, self.trials.attention, self.compiler.wide)
            for kind in BlockKind
        }

    def _try_second_halves(self, names: list[SegmentName]) -> Collection[SegmentName]:
        """Those of TensorRT's second halves that cannot win, each left out with its reason; the others are built."""
        choices = self._choose()
        reasons = {name: self._why_not_second_half(name, choices[name.kind][1]) for name in names}
        hopeless = {name: reason for name, reason in reasons.items() if reason}
        for name, reason in hopeless.items():
            self.trials.leave_out(name.value, Backend.TENSORRT, reason)
        building = [name for name in names if name not in hopeless]
        self._build(building, _BUILDER_PROCESSES, lambda: None)
        self.trials.measure([(name, Backend.TENSORRT) for name in building])
        return hopeless.keys()

    def _why_not_second_half(self, name: SegmentName, best_ms: float) -> str | None:
        """None where too little is known: the half is built then, as it may win alone or in a mix.

        That is where TensorRT's first half failed, whose reason need not concern the second, or Inductor's whole block,
        which leaves eager PyTorch to be beaten.
        """
        measured, (first, _) = self.trials.milliseconds, SPLIT_SEGMENTS[name.kind]
        if not {(first, Backend.TENSORRT), (WHOLE_SEGMENT[name.kind], Backend.INDUCTOR)} <= measured.keys():
            return None
        products_ms = [self.trials.products_milliseconds(half) for half in (first, name)]
        attention_ms = self.trials.attention.between_ms
        return why_not_second_half(measured[first, Backend.TENSORRT], *products_ms, best_ms, attention_ms)

    def _try_inductor_halves(self) -> None:
        """Compiles Inductor's halves where one of them can still win beside TensorRT's other half."""
        choices = self._choose()
        jobs: list[Job] = []
        for name in halves():
            if reason := self._why_not_half(name, choices[name.kind][1]):
                self.trials.leave_out(name.value, Backend.INDUCTOR, reason)
            else:
                jobs.append((name, Backend.INDUCTOR))
        self.trials.compile(jobs)
        self.trials.measure(jobs)

    def _why_not_half(self, name: SegmentName, best_ms: float) -> str | None:
        """The half's products are timed only where nothing else decides."""
        measured, attention_ms = self.trials.milliseconds, self.trials.attention.between_ms
        reason = why_not_inductor_half(name, measured, best_ms, attention_ms)
        if reason or (WHOLE_SEGMENT[name.kind], Backend.INDUCTOR) not in measured:
            return reason
        products_ms = self.trials.products_milliseconds(name)
        return why_not_inductor_half(name, measured, best_ms, attention_ms, products_ms)

    def _try_whole_tensorrt(self, hopeless: Collection[SegmentName]) -> None:
        """Builds TensorRT's whole blocks where they can still win. `hopeless`: halves that could not."""
        choices = self._choose()
        names = []
        for kind in BlockKind:
            if reason := why_not_whole_tensorrt(kind, self.trials.milliseconds, choices[kind][1], hopeless):
                self.trials.leave_out(WHOLE_SEGMENT[kind].value, Backend.TENSORRT, reason)
            else:
                names.append(WHOLE_SEGMENT[kind])
        self._build(self.trials.not_cached(names), _BUILDER_PROCESSES, lambda: None)
        self.trials.measure([(name, Backend.TENSORRT) for name in names])
