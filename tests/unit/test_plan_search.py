"""The search for a plan on a machine without a GPU: what is chosen, refused, remembered and said."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_flux import bfl_weights, call_inputs, loaded, run, run_diffusers, shapes_of, tiny_transformer
from trt_core import plan_search
from trt_core.backends.compiler import SegmentCompiler
from trt_core.config import Attention, Backend, CompileConfig, Layout, Profile, ShapeRange
from trt_core.engine_cache import EngineCache
from trt_core.errors import BuildCancelled, MissingDependency, UnsupportedGPU
from trt_core.flux import cublaslt_kernels
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.catalogue import SegmentName
from trt_core.flux.cublaslt_kernels import Kernel, preferred
from trt_core.flux.products import Product
from trt_core.host import Silent
from trt_core.kernel_ranking import rank_kernels
from trt_core.plan import AttentionChoice, BlockKind, KernelChoice, Measurement, Plan
from trt_core.plan_search import PlanSearch

MODEL = tiny_transformer(head_dim=16)
ARCH = FluxArchitecture.from_shapes(shapes_of(bfl_weights(MODEL)))
PROFILE = Profile(ShapeRange(8, 40, 64), ShapeRange(1, 7, 16), ShapeRange(1, 1, 4))
HALVES = {
    (name, Backend.EAGER)
    for name in (SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT, SegmentName.SINGLE_QKV_MLP, SegmentName.SINGLE_OUT)
}


class Watched(Silent):
    """Progress that remembers what it was told, and is cancelled after so many of them."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self.stages: list[str] = []
        self.cancel_at = cancel_at

    def update(self, stage: str, done: int, total: int) -> None:
        self.stages.append(stage)
        assert 0 <= done <= total

    def cancelled(self) -> bool:
        return self.cancel_at is not None and len(self.stages) >= self.cancel_at


def search(
    cache: Path, backend: Backend = Backend.AUTO, layout: Layout | None = None, dtype: torch.dtype = torch.float32,
    arch: FluxArchitecture = ARCH, profile: Profile = PROFILE, progress: Silent | None = None, **options: Any,
) -> PlanSearch:  # fmt: skip
    compiler = SegmentCompiler(arch, dtype, torch.device("cpu"), profile, EngineCache(cache), 1.5, progress or Silent())
    return PlanSearch(compiler, CompileConfig(backend, cache_folder=str(cache), **options), layout)


def test_fp8_attention_that_is_not_exact_enough_is_left_out(tmp_path: Path) -> None:
    """In fp32 it never is: the block is compiled without it, the other kind of block is not concerned."""
    found = search(tmp_path, Backend.INDUCTOR)
    inside = dict.fromkeys(BlockKind, Attention.FP8)
    found.trials.attention = AttentionChoice(Attention.AUTO, 0.1, inside)
    found.trials.compile_one(SegmentName.SINGLE_BLOCK, Backend.INDUCTOR).close()
    assert found.trials.attention.inside == {BlockKind.DOUBLE: Attention.FP8}
    (left_out,) = found.trials.measurements
    assert left_out.what == "fp8 attention in single_block"
    assert "times eager PyTorch's error" in str(left_out.left_out)
    assert found.compiler.error_ratios[SegmentName.SINGLE_BLOCK, Backend.INDUCTOR] <= 1.5


def test_forced_fp8_attention_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedGPU, match=r'attention="fp8" cannot be used: it needs an NVIDIA GPU.*attention="auto"'
    ):
        search(tmp_path, Backend.EAGER, attention=Attention.FP8).run()


def test_products_that_are_not_fp8_are_so_again_when_the_plan_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_search, "rank_products", lambda compiler: (frozenset({BlockKind.SINGLE}), []))
    first = search(tmp_path)
    assert first.run()[0].single.wide
    again = search(tmp_path)
    monkeypatch.setattr(plan_search, "rank_products", None)
    assert again.run()[0].single.wide
    assert again.compiler.wide == first.compiler.wide == {BlockKind.SINGLE}


def test_kernels_of_products_are_taken_when_the_plan_is_searched_and_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublaslt_kernels, "_PREFERRED", {})
    product, kernel = Product(47, 192, 48), Kernel("128x160", "2x1", 1)
    measured = [Measurement("linear1", "cuBLASLt 128x160, 2x1, 1", 0.1)]
    asked: list[Attention] = []

    def ranked(compiler: SegmentCompiler, attention: Attention) -> tuple[tuple[KernelChoice, ...], list[Measurement]]:
        asked.append(attention)
        return (KernelChoice(product, kernel),), measured

    monkeypatch.setattr(plan_search, "rank_kernels", ranked)
    searching = search(tmp_path, Backend.INDUCTOR)
    compile_jobs = searching.trials.compile
    seen: list[Kernel | None] = []
    monkeypatch.setattr(
        type(searching.trials), "compile", lambda self, jobs: seen.append(preferred(0, product)) or compile_jobs(jobs)
    )
    plan, _ = searching.run()
    assert (asked, seen) == ([Attention.AUTO], [kernel]), "before blocks are compiled and measured"
    assert plan.kernels == (KernelChoice(product, kernel),)
    assert measured[0] in plan.measurements
    monkeypatch.setattr(cublaslt_kernels, "_PREFERRED", {})
    monkeypatch.setattr(plan_search, "rank_kernels", None)
    assert search(tmp_path, Backend.INDUCTOR).run()[0] == plan
    assert preferred(0, product) == kernel


def test_nothing_is_measured_for_products_that_are_not_cublaslts() -> None:
    compiler = SegmentCompiler(
        ARCH, torch.bfloat16, torch.device("cpu"), PROFILE, EngineCache(Path("nowhere")), 1.5, Silent()
    )
    assert rank_kernels(compiler, Attention.AUTO) == ((), [])


def test_auto_takes_eager_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trt_core"):
        plan, compiled = search(tmp_path).run()
    assert {backend for _, backend, _ in plan.needed()} == {Backend.EAGER}
    assert compiled.keys() == HALVES
    out = {m.backend: m.left_out for m in plan.measurements if m.left_out}
    assert out == {"inductor": 'no GPU; backend="inductor" compiles for the CPU'}
    timed = {m.what for m in plan.measurements if m.milliseconds}
    assert timed == {"attention", *(name.value for name, _ in HALVES)}
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("plan double: split eager + eager"))
    assert "ms per step" in line
    assert any("inductor is left out for all segments" in r.getMessage() for r in caplog.records)


def test_tensorrt_without_a_gpu_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        MissingDependency, match=r'backend="tensorrt" cannot be used here: .*Use backend="auto"'
    ) as caught:
        search(tmp_path, Backend.TENSORRT).run()
    assert caught.value.widget == "backend"
    assert not list(tmp_path.rglob("plan.json"))


def test_a_forced_backend_is_not_timed(tmp_path: Path) -> None:
    plan, _ = search(tmp_path, Backend.EAGER).run()
    assert all(m.milliseconds is None for m in plan.measurements if m.what != "attention")


def test_a_forced_attention_is_taken(tmp_path: Path) -> None:
    plan, _ = search(tmp_path, attention=Attention.MATH).run()
    assert plan.double.attention is plan.single.attention is Attention.MATH


def test_masks_ask_for_split_blocks(tmp_path: Path) -> None:
    plan, _ = search(tmp_path, layout=Layout.SPLIT).run()
    assert plan.double.layout is plan.single.layout is Layout.SPLIT


# -- the choice is remembered ----------------------------------------------------------------------------------------


def was_searched(searched: PlanSearch) -> bool:
    """A search measures; a remembered plan is only loaded."""
    return bool(searched.trials.milliseconds)


def test_a_plan_is_remembered(tmp_path: Path) -> None:
    first, again = search(tmp_path), search(tmp_path)
    plan, _ = first.run()
    remembered, compiled = again.run()
    assert was_searched(first)
    assert not was_searched(again)
    assert remembered == plan, "measurements included"
    assert compiled.keys() == HALVES


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.bfloat16}, {"backend": Backend.EAGER}, {"layout": Layout.SPLIT},
        {"attention": Attention.MATH}, {"arch": replace(ARCH, mlp_hidden=64)},
        {"profile": replace(PROFILE, img_tokens=ShapeRange(8, 40, 128))},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_another_question_is_another_plan(other: dict[str, Any], tmp_path: Path) -> None:
    search(tmp_path).run()
    asked = search(tmp_path, **other)
    asked.run()
    assert was_searched(asked)


@pytest.mark.parametrize(
    "same",
    [
        {"arch": replace(ARCH, double_depth=19, in_channels=384, guidance=False)},
        {"profile": replace(PROFILE, img_tokens=ShapeRange(8, 24, 64))},
    ],
    ids=["another checkpoint", "another first size"],
)
def test_the_same_question_is_the_same_plan(same: dict[str, Any], tmp_path: Path) -> None:
    search(tmp_path).run()
    asked = search(tmp_path, **same)
    asked.run()
    assert not was_searched(asked)


def _stored_plan(cache: Path) -> Path:
    return next(cache.rglob("plan.json"))


def test_a_damaged_plan_is_searched_again_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search(tmp_path).run()
    stored = _stored_plan(tmp_path)
    whole = stored.read_bytes()
    stored.write_bytes(whole[: len(whole) // 2])
    damaged = search(tmp_path)
    damaged.run()
    assert was_searched(damaged)
    assert "Ignoring the cached engine" in caplog.text
    mended = search(tmp_path)
    mended.run()
    assert not was_searched(mended)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"double": 1}', b'{"double": {"kind": "double"}}'])
def test_a_plan_of_another_version_is_searched_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = search(tmp_path)
    asked.compiler.cache.put(asked.store.key(), {"plan.json": content}, {})
    plan, _ = asked.run()
    assert was_searched(asked)
    assert "The cached plan is not used" in caplog.text
    assert Plan.from_json(_stored_plan(tmp_path).read_bytes()) == plan


# -- a cache that cannot be written ----------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_said_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    plan, compiled = search(tmp_path / "file" / "cache").run()
    assert compiled.keys() == HALVES
    assert plan.choice(BlockKind.DOUBLE).layout is Layout.SPLIT
    assert "The plan works but is not kept: The engine cache" in caplog.text


def test_a_cache_that_can_only_be_read_still_serves_what_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(tmp_path).run()
    entry = _stored_plan(tmp_path).parent
    (entry.parent / "write.lock").mkdir()  # stops every writer; permissions would not stop root
    again, other = search(tmp_path), search(tmp_path, dtype=torch.bfloat16)
    again.run()
    other.run()
    assert not was_searched(again)
    assert was_searched(other)
    assert "The plan works but is not kept" in caplog.text


def test_a_model_runs_with_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    inputs = call_inputs(MODEL)
    seen = run(loaded(bfl_weights(MODEL), tmp_path / "file", Backend.AUTO), inputs)
    assert torch.allclose(seen, run_diffusers(MODEL, inputs), atol=1e-5)


# -- progress and cancel ---------------------------------------------------------------------------------------------


def test_progress_is_told_every_stage(tmp_path: Path) -> None:
    progress = Watched()
    search(tmp_path, progress=progress).run()
    assert progress.stages == [f"eager compiles {n.value}" for n in SegmentName if (n, Backend.EAGER) in HALVES]
    again = Watched()
    search(tmp_path, progress=again).run()
    assert again.stages == ["Loading the plan"] * 4


@pytest.mark.parametrize("stages", [0, 1, 3])
@pytest.mark.parametrize("remembered", [False, True], ids=["search", "load"])
def test_cancel_stops_and_the_next_run_works(stages: int, remembered: bool, tmp_path: Path) -> None:
    if remembered:
        search(tmp_path).run()
    with pytest.raises(BuildCancelled, match="Cancelled during"):
        search(tmp_path, progress=Watched(cancel_at=stages)).run()
    _, compiled = search(tmp_path).run()
    assert compiled.keys() == HALVES
