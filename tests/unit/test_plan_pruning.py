"""Which candidates a search builds on a GPU with TensorRT: those that can still win, said for all others.

The search is the real one; what compiles and what it takes are a table of milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_plan_search import ARCH, PROFILE, Watched
from trt_core import plan_search, trials
from trt_core.backends.compiler import SegmentCompiler
from trt_core.config import Attention, Backend, CompileConfig, Layout
from trt_core.engine_cache import EngineCache
from trt_core.errors import BuildCancelled, BuildFailed
from trt_core.flux.catalogue import SPLIT_SEGMENTS, BlockKind, SegmentName
from trt_core.host import Silent
from trt_core.plan import WHOLE_SEGMENT, AttentionChoice, Measurement
from trt_core.plan_search import PlanSearch

TRT, IND, EAGER = Backend.TENSORRT, Backend.INDUCTOR, Backend.EAGER
QKV, OUT, DOUBLE = SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT, SegmentName.DOUBLE_BLOCK
SINGLE_QKV, SINGLE_OUT, SINGLE = SegmentName.SINGLE_QKV_MLP, SegmentName.SINGLE_OUT, SegmentName.SINGLE_BLOCK
FIRST, SECOND = [QKV, SINGLE_QKV], [OUT, SINGLE_OUT]
HALVES = [name for kind in BlockKind for name in SPLIT_SEGMENTS[kind]]
WHOLES = list(WHOLE_SEGMENT.values())
ATTENTION_MS = 0.403

Table = Mapping[tuple[SegmentName, Backend], float]

H100: Table = {
    (DOUBLE, IND): 2.042, (QKV, IND): 0.489, (OUT, IND): 1.209, (DOUBLE, TRT): 3.4,
    (QKV, EAGER): 1.606, (OUT, EAGER): 1.357, (QKV, TRT): 1.111, (OUT, TRT): 1.960,
    (SINGLE, IND): 1.891, (SINGLE_QKV, IND): 0.850, (SINGLE_OUT, IND): 0.656, (SINGLE, TRT): 3.5,
    (SINGLE_QKV, EAGER): 1.868, (SINGLE_OUT, EAGER): 0.859, (SINGLE_QKV, TRT): 1.978, (SINGLE_OUT, TRT): 1.205,
}  # fmt: skip
"""All candidates as measured there (TensorRT's whole blocks from their halves)."""
H100_PRODUCTS: Mapping[SegmentName, float] = {QKV: 0.45, OUT: 0.95, SINGLE_QKV: 0.90, SINGLE_OUT: 0.55}
ANOTHER_GPU: Table = {**H100, (QKV, TRT): 0.30, (OUT, TRT): 1.5}
"""Where TensorRT's first half is so fast that a mix wins. Its second half may win, too, and does not."""
FAST_TENSORRT: Table = {**H100, (QKV, TRT): 0.48, (OUT, TRT): 1.0, (DOUBLE, TRT): 1.95}
"""Where TensorRT's halves of the double block are hardly slower than their products, and both win."""


class Fake:
    """A compiled segment that only knows how long it takes."""

    plan_bytes = 0

    def __init__(self, backend: Backend, milliseconds: float, closed: Callable[[], None]) -> None:
        self.backend, self.milliseconds, self.close = backend, milliseconds, closed

    def __call__(self, *tensors: torch.Tensor) -> Any:
        return self.milliseconds


class Gpu(SegmentCompiler):
    """A compiler on a machine whose table of milliseconds is known."""

    def on(self, table: Table, products: Mapping[SegmentName, float]) -> Gpu:
        self.table, self.products, self.events, self.open = table, products, [], 0
        self.broken: set[tuple[SegmentName, Backend]] = set()
        self.cached: set[SegmentName] = set()
        self.builds: list[tuple[int, list[SegmentName]]] = []
        return self

    def made(self, name: SegmentName, backend: Backend) -> Any:
        self.events.append((name, backend))
        if (name, backend) in self.broken:
            raise BuildFailed(f"{name.value} does not compile")
        self.open += 1
        return Fake(backend, self.table[name, backend], self._closed)

    def _closed(self) -> None:
        self.open -= 1

    def compile(self, name: SegmentName, backend: Backend, attention: Attention) -> Any:
        return self.made(name, backend)

    def from_cache(self, name: SegmentName) -> Any:
        return self.made(name, TRT) if name in self.cached else None

    def from_plan(self, name: SegmentName, plan: bytes) -> Any:
        return self.made(name, TRT)

    def inputs(self, name: SegmentName, attention: Attention | None) -> list[torch.Tensor]:
        return []

    def products_milliseconds(self, name: SegmentName) -> float:
        self.events.append(f"products of {name.value}")
        return self.products.get(name, 0.0)


def _built(compiler: Gpu, names: list[SegmentName], processes: int, meanwhile: Callable[[], None]) -> Any:
    compiler.events.append(f"{processes} builders start" if names else "no builders")
    compiler.builds += [(processes, names)] if names else []
    meanwhile()
    compiler.events.append("builders end")
    return dict.fromkeys(names, b"plan")


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PlanSearch]:
    ranked = AttentionChoice(Attention.CUDNN, ATTENTION_MS), [Measurement("attention", "cudnn", ATTENTION_MS)]
    monkeypatch.setattr(plan_search, "rank_attention", lambda compiler, forced: ranked)
    monkeypatch.setattr(plan_search, "build_plans", _built)
    monkeypatch.setattr(trials, "median_milliseconds", lambda run, device: run())
    monkeypatch.setattr(PlanSearch, "_backends", lambda self: self.compiler.candidates)

    def search(
        table: Table, products: Mapping[SegmentName, float] = H100_PRODUCTS, layout: Layout | None = None,
        backends: tuple[Backend, ...] = (TRT, IND, EAGER), progress: Silent | None = None,
        broken: tuple[tuple[SegmentName, Backend], ...] = (), backend: Backend = Backend.AUTO,
        cached: Sequence[SegmentName] = (),
    ) -> PlanSearch:  # fmt: skip
        cache = EngineCache(tmp_path / str(len(list(tmp_path.iterdir()))))
        gpu = Gpu(ARCH, torch.float32, torch.device("cpu"), PROFILE, cache, 1.5, progress or Silent())
        gpu.on(table, products).broken |= set(broken)
        gpu.cached |= set(cached)
        gpu.candidates = list(backends)
        return PlanSearch(gpu, CompileConfig(backend), layout)

    return search


def compiled_by(search: PlanSearch, backend: Backend) -> list[SegmentName]:
    return [event[0] for event in search.compiler.events if event[1:] == (backend,)]


def left_out(search: PlanSearch, backend: Backend) -> dict[str, str]:
    return {m.what: m.left_out for m in search.trials.measurements if m.left_out and m.backend == backend.value}


def test_on_an_h100_inductor_compiles_two_segments_and_says_why_not_the_others(
    searched: Callable[..., PlanSearch], caplog: pytest.LogCaptureFixture
) -> None:
    search = searched(H100)
    with caplog.at_level(logging.INFO, "trt_core"):
        plan, compiled = search.run()
    assert compiled.keys() == {(DOUBLE, IND), (SINGLE, IND)}
    assert plan.double.layout is plan.single.layout is Layout.WHOLE
    assert compiled_by(search, IND) == WHOLES
    assert compiled_by(search, TRT) == FIRST
    assert left_out(search, IND).keys() == {name.value for name in HALVES}
    assert left_out(search, TRT).keys() == {name.value for name in [*SECOND, *WHOLES]}
    assert all(f"inductor is left out for {name.value}: " in caplog.text for name in HALVES)
    assert search.compiler.open == len(compiled), "what lost is closed"


@pytest.mark.parametrize("products", [{}, H100_PRODUCTS], ids=["unknown products", "known products"])
def test_pruning_changes_no_choice(searched: Callable[..., PlanSearch], products: Mapping[SegmentName, float]) -> None:
    for table in (H100, ANOTHER_GPU, FAST_TENSORRT):
        plan, _ = searched(table, products).run()
        everything = AttentionChoice(Attention.CUDNN, ATTENTION_MS)
        for kind in BlockKind:
            assert plan.choice(kind) == plan_search.choose(kind, table, everything)[0]


def test_a_half_is_compiled_where_it_can_win_and_wins(searched: Callable[..., PlanSearch]) -> None:
    search = searched(ANOTHER_GPU)
    plan, _ = search.run()
    assert compiled_by(search, IND) == [*WHOLES, OUT]
    assert plan.double.backends == (TRT, IND)
    assert ANOTHER_GPU[QKV, TRT] + ATTENTION_MS + ANOTHER_GPU[OUT, IND] < ANOTHER_GPU[DOUBLE, IND]


def test_products_are_timed_only_where_nothing_else_decides(searched: Callable[..., PlanSearch]) -> None:
    assert products_timed(searched(H100)) == HALVES, "once each, though two rules ask for double_out's"
    assert products_timed(searched(H100, cached=SECOND)) == [OUT], "TensorRT's is measured, Inductor's is not"
    assert products_timed(searched(H100, layout=Layout.SPLIT)) == []
    assert products_timed(searched(H100, backends=(TRT, EAGER))) == []
    assert products_timed(searched(H100, backends=(IND, EAGER))) == []


def products_timed(search: PlanSearch) -> list[SegmentName]:
    search.run()
    words = "products of "
    return [SegmentName(e.removeprefix(words)) for e in search.compiler.events if str(e).startswith(words)]


# -- TensorRT's second halves ----------------------------------------------------------------------------------------


def test_first_halves_are_built_beside_inductor_and_second_ones_only_where_they_can_win(
    searched: Callable[..., PlanSearch],
) -> None:
    search = searched(FAST_TENSORRT)
    plan, _ = search.run()
    assert search.compiler.builds == [(1, FIRST), (2, [OUT]), (2, [DOUBLE])]
    assert plan.double.backends == (TRT, TRT)
    assert plan.double.layout is Layout.SPLIT
    assert {m.what for m in search.trials.measurements if m.backend == "tensorrt" and m.milliseconds} == {
        name.value for name in [*FIRST, OUT, DOUBLE]
    }


def test_a_hopeless_second_half_is_left_out_with_its_reason_and_so_is_the_whole_block(
    searched: Callable[..., PlanSearch], caplog: pytest.LogCaptureFixture
) -> None:
    search = searched(H100)
    with caplog.at_level(logging.INFO, "trt_core"):
        search.run()
    assert search.compiler.builds == [(1, FIRST)]
    reasons = left_out(search, TRT)
    assert reasons["double_out"] == (
        "TensorRT's first half takes 2.5 times its matrix products: a block with its second half is expected to take "
        "2.61 ms or more, the best block 2.04 ms"
    )
    assert "takes 2.2 times" in reasons["single_out"]
    assert reasons["double_block"] == "it does the work of double_out, too, which is left out"
    assert reasons["single_block"] == "it does the work of single_out, too, which is left out"
    assert f"tensorrt is left out for double_out: {reasons['double_out']}" in caplog.text


def test_what_is_left_out_would_have_been_slower_than_expected() -> None:
    for first, second in ((QKV, OUT), (SINGLE_QKV, SINGLE_OUT)):
        slowness = H100[first, TRT] / H100_PRODUCTS[first]
        assert 0.75 * slowness * H100_PRODUCTS[second] < H100[second, TRT]


def test_a_second_half_in_the_cache_is_measured_at_once(searched: Callable[..., PlanSearch]) -> None:
    search = searched(H100, cached=[OUT])
    search.run()
    assert search.compiler.builds == [(1, FIRST)]
    assert search.trials.milliseconds[OUT, TRT] == H100[OUT, TRT]
    assert left_out(search, TRT).keys() == {name.value for name in [SINGLE_OUT, *WHOLES]}
    assert "its halves take" in left_out(search, TRT)["double_block"], "as was measured"


def test_first_halves_in_the_cache_leave_only_second_ones_to_build(searched: Callable[..., PlanSearch]) -> None:
    search = searched(FAST_TENSORRT, cached=FIRST)
    search.run()
    assert search.compiler.builds == [(2, [OUT]), (2, [DOUBLE])]


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ({"layout": Layout.SPLIT}, 1),
        ({"backends": (TRT,), "backend": TRT}, 2),
        ({"backends": (TRT,), "backend": TRT, "layout": Layout.SPLIT}, 2),
        ({"backends": (TRT, EAGER)}, 1),
    ],
    ids=["masks", "forced", "forced with masks", "without Inductor"],
)
def test_all_halves_are_built_at_once_where_no_whole_block_of_inductors_is_measured(
    searched: Callable[..., PlanSearch], options: dict[str, Any], processes: int
) -> None:
    search = searched(H100, **options)
    search.run()
    assert search.compiler.builds[0] == (processes, HALVES)


@pytest.mark.parametrize("broken", [(QKV, TRT), (DOUBLE, IND)], ids=["first half", "Inductor's whole block"])
def test_without_what_expectations_rest_on_the_second_half_is_built(
    searched: Callable[..., PlanSearch], broken: tuple[SegmentName, Backend]
) -> None:
    """Eager PyTorch is as fast here as Inductor, so that nothing else is a reason to build it."""
    search = searched({**H100, (QKV, EAGER): 0.65, (OUT, EAGER): 0.95}, broken=(broken,))
    search.run()
    assert search.compiler.builds[1] == (2, [OUT])
    assert (OUT, TRT) in search.trials.milliseconds


def test_a_second_half_that_fails_is_no_reason_against_the_whole_block(searched: Callable[..., PlanSearch]) -> None:
    search = searched(FAST_TENSORRT, broken=((OUT, TRT),))
    search.run()
    assert left_out(search, TRT)["double_out"].startswith("double_out does not compile")
    assert search.compiler.builds[-1] == (2, [DOUBLE])


# -- builders --------------------------------------------------------------------------------------------------------


def test_builders_end_before_engines_are_loaded_and_inductor_compiles_beside_them(
    searched: Callable[..., PlanSearch],
) -> None:
    search = searched(ANOTHER_GPU)
    search.run()
    events = search.compiler.events
    assert events[:3] == ["1 builders start", (DOUBLE, IND), (SINGLE, IND)]
    ended = events.index("builders end")
    assert all(events.index((name, TRT)) > ended for name in FIRST)
    ended = events.index("builders end", ended + 1)
    assert events.index((OUT, TRT)) > ended


def test_a_tensorrt_that_builds_nothing_is_left_out(searched: Callable[..., PlanSearch]) -> None:
    search = searched(H100, broken=tuple((name, TRT) for name in [*HALVES, *WHOLES]))
    plan, _ = search.run()
    assert plan.double.backends == plan.single.backends == (IND,)
    assert left_out(search, TRT).keys() == {name.value for name in [*HALVES, *WHOLES]}
    assert compiled_by(search, IND) == WHOLES


def test_masks_compile_inductors_halves_at_once_and_no_whole_block(searched: Callable[..., PlanSearch]) -> None:
    search = searched(H100, layout=Layout.SPLIT)
    plan, _ = search.run()
    assert compiled_by(search, IND) == HALVES
    assert compiled_by(search, TRT) == HALVES
    assert plan.double.backends == plan.single.backends == (IND, IND)


def test_without_tensorrt_inductor_compiles_whole_blocks_alone(searched: Callable[..., PlanSearch]) -> None:
    search = searched(H100, backends=(IND, EAGER))
    plan, _ = search.run()
    assert compiled_by(search, IND) == WHOLES
    assert plan.double.backends == (IND,)


def test_without_inductor_tensorrts_whole_blocks_are_still_tried(searched: Callable[..., PlanSearch]) -> None:
    search = searched({**H100, (OUT, TRT): 1.0, (DOUBLE, TRT): 2.0}, backends=(TRT, EAGER))
    plan, _ = search.run()
    assert plan.double.backends == (TRT,)
    assert not left_out(search, IND)


def test_an_inductor_block_that_fails_leaves_its_halves_as_candidates(searched: Callable[..., PlanSearch]) -> None:
    search = searched(H100, broken=((DOUBLE, IND),))
    plan, _ = search.run()
    assert compiled_by(search, IND) == [DOUBLE, SINGLE, QKV, OUT]
    assert plan.double.backends == (IND, IND)


def test_a_tensorrt_half_that_fails_leaves_nothing_to_mix_with(searched: Callable[..., PlanSearch]) -> None:
    search = searched(ANOTHER_GPU, broken=((QKV, TRT),))
    plan, _ = search.run()
    assert plan.double.backends == (IND,)
    assert left_out(search, IND)["double_out"] == "TensorRT has no double_qkv to run beside it"


@pytest.mark.parametrize("backend", [TRT, IND])
def test_a_forced_backend_compiles_its_own_segments_alone(
    searched: Callable[..., PlanSearch], backend: Backend
) -> None:
    search = searched(H100, backends=(backend,), backend=backend)
    search.run()
    assert compiled_by(search, backend) == (HALVES if backend is TRT else WHOLES)
    assert sum(isinstance(event, tuple) for event in search.compiler.events) == len(compiled_by(search, backend))


def test_cancel_at_every_stage_leaves_nothing_open(searched: Callable[..., PlanSearch]) -> None:
    all_stages = Watched()
    searched(ANOTHER_GPU, progress=all_stages).run()
    assert len(all_stages.stages) == 6 + 2 + 1 + 1 + 1, "compiled, loaded, a second half, a mix's half, a whole block"
    for stages in range(len(all_stages.stages)):
        search = searched(ANOTHER_GPU, progress=Watched(stages))
        with pytest.raises(BuildCancelled):
            search.run()
        assert search.compiler.open == 0
        assert not search.trials.compiled
        assert search.store.remembered() is None
