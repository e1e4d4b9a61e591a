"""Builder processes beside other work: outcomes for each segment, none left whatever happens; products timed alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.processes import alive
from tests.unit.test_backends import ARCH, CPU, compiler
from trt_core import engine_builds
from trt_core.backends import products
from trt_core.backends.compiler import SegmentCompiler
from trt_core.backends.tensorrt_builders import Builders
from trt_core.engine_builds import build_plans
from trt_core.errors import BuildCancelled, BuildFailed
from trt_core.flux import fp8
from trt_core.flux.catalogue import SPLIT_SEGMENTS, BlockKind, SegmentName
from trt_core.flux.fp8 import FP8
from trt_core.host import Silent

ROOT = Path(__file__).parents[2]
QKV, OUT = SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without TensorRT says")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Ids of all builder processes that were started."""
    started: list[int] = []

    class Watched(Builders):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            started.extend(worker.pid for worker in self._workers)

    monkeypatch.setattr(engine_builds, "Builders", Watched)
    monkeypatch.setattr(SegmentCompiler, "timing_cache", lambda self: tmp_path / "timing.bin")
    return started


@no_gpu
def test_a_failed_build_is_an_outcome_and_the_processes_have_ended(tmp_path: Path, processes: list[int]) -> None:
    beside: list[bool] = []
    built = build_plans(compiler(tmp_path), [OUT, QKV], 1, lambda: beside.append(alive(processes[0])))
    assert beside == [True], "other work goes on beside a builder that runs"
    assert built.keys() == {QKV, OUT}
    assert all(isinstance(outcome, BuildFailed) for outcome in built.values())
    assert len(processes) == 1
    assert not alive(processes[0])


def test_work_beside_the_builders_that_fails_ends_them(tmp_path: Path, processes: list[int]) -> None:
    def fail() -> None:
        raise BuildFailed("beside")

    with pytest.raises(BuildFailed, match="beside"):
        build_plans(compiler(tmp_path), [QKV, OUT], 2, fail)
    assert len(processes) == 2
    assert not any(map(alive, processes))


def test_cancel_ends_builders(tmp_path: Path, processes: list[int]) -> None:
    class Cancelled(Silent):
        def cancelled(self) -> bool:
            return True

    asked = compiler(tmp_path)
    asked.progress = Cancelled()
    with pytest.raises(BuildCancelled, match="TensorRT builds"):
        build_plans(asked, [QKV], 2, lambda: None)
    assert len(processes) == 1, "not more processes than segments"
    assert not alive(processes[0])


def test_nothing_to_build_starts_no_process(tmp_path: Path, processes: list[int]) -> None:
    done: list[int] = []
    assert build_plans(compiler(tmp_path), [], 2, lambda: done.append(1)) == {}
    assert done == [1]
    assert not processes


_ANSWERS_TWICE = """
from trt_core.backends import tensorrt_worker as worker
noted = []
worker._answer = lambda job: {"id": job["id"], "given_back_before": len(noted)}
worker.give_back_heap = lambda: noted.append(True)
worker.main()
"""


def test_a_builder_gives_freed_memory_back_before_the_next_build() -> None:
    jobs = '{"id": 0}\n{"id": 1}\n'
    process = subprocess.run(
        [sys.executable, "-c", _ANSWERS_TWICE], input=jobs, capture_output=True, text=True, cwd=ROOT
    )
    assert [json.loads(line)["given_back_before"] for line in process.stdout.splitlines()] == [0, 1], process.stderr


# -- matrix products alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BlockKind)
def test_the_products_of_a_block_are_those_of_its_halves(kind: BlockKind, tmp_path: Path) -> None:
    """As multiplications, not as milliseconds: those of every weight matrix with all of its tokens, once."""

    def multiplications(name: SegmentName) -> int:
        noted = products._NotedProducts()
        asked = compiler(tmp_path, dtype=torch.float32).request(name)
        inputs = asked.segment.random_inputs(2, 40, 7, torch.float32, CPU)
        with noted:
            asked.reference(*inputs)
        return sum(x.shape[0] * weight.numel() for x, weight in (call.args[:2] for call in noted.calls))

    halves = [multiplications(name) for name in SPLIT_SEGMENTS[kind]]
    whole = {BlockKind.DOUBLE: SegmentName.DOUBLE_BLOCK, BlockKind.SINGLE: SegmentName.SINGLE_BLOCK}[kind]
    hidden, mlp = ARCH.hidden, ARCH.mlp_hidden
    assert sum(halves) == multiplications(whole) == 2 * 47 * hidden * (4 * hidden + 2 * mlp)


def test_products_take_less_than_their_segment_and_nothing_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    monkeypatch.setattr(products, "median_milliseconds", lambda run, device: float(len(run())))
    assert compiler(tmp_path).products_milliseconds(OUT) == 6, "projection and MLP of image and of text"
    asked = compiler(tmp_path).request(OUT)
    monkeypatch.setattr(products, "median_milliseconds", lambda run, device: runs.append(1))
    assert products.products_milliseconds(replace(asked, reference=lambda: (torch.zeros(1),)), []) == 0.0
    assert not runs


def test_products_of_fp8_layers_are_seen_and_none_are_known_where_weights_are_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operator that `fp8.scaled_linear` calls on a GPU for bf16, and by PyTorch's, which it calls for others."""
    q, weight, scale = torch.ones(16, 32).to(FP8), torch.ones(48, 32).to(FP8), torch.ones(1)

    def both() -> tuple[torch.Tensor, ...]:
        plain = torch._scaled_mm(q, weight.t(), scale_a=scale, scale_b=scale, out_dtype=torch.float32)
        return plain, fp8.PRODUCT(q, scale.expand(16, 1), weight, scale.expand(48, 1), None)

    asked = replace(compiler(tmp_path).request(OUT), reference=both)
    results: list[torch.Tensor] = []
    monkeypatch.setattr(products, "median_milliseconds", lambda run, device: results.extend(run()) or 3.0)
    assert products.products_milliseconds(asked, []) == 3.0
    assert [result.dtype for result in results] == [torch.float32, torch.bfloat16]
    assert all(torch.equal(result.float(), torch.full((16, 48), 32.0)) for result in results)
    widened = compiler(tmp_path)
    widened.wide = frozenset({BlockKind.DOUBLE})
    assert widened.products_milliseconds(OUT) == 0.0
