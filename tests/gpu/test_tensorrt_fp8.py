"""FP8 segments in TensorRT: every recipe is built by a builder process, runs, and is as exact as eager FP8.

Run with -s to see, for each, the error in multiples of eager FP8's and the time beside eager's and bf16's.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.sums import added
from trt_core.backends.base import Request
from trt_core.backends.check import error_ratio, relative_l2
from trt_core.backends.compiler import SegmentCompiler, tensorrt_runtime
from trt_core.backends.tensorrt import Scratch, TensorRTSegment
from trt_core.backends.tensorrt_builders import Builders
from trt_core.backends.tensorrt_fp8 import why_not_tensorrt_fp8
from trt_core.config import Backend, CompileConfig, Profile, ShapeRange
from trt_core.engine_cache import EngineCache
from trt_core.errors import BuildFailed
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.catalogue import BlockKind, SegmentName
from trt_core.flux.precision import PLAIN, Precision
from trt_core.gpu import current_gpu
from trt_core.host import Silent
from trt_core.measure import median_milliseconds
from trt_core.plan import WHOLE_SEGMENT
from trt_core.plan_search import PlanSearch

pytestmark = pytest.mark.usefixtures("needs_tensorrt")
DEVICE = torch.device("cuda", 0)
SMALL = FluxArchitecture(256, 2, 1, 2, 64, 64, 128, 64, 1024, True)
FULL = FluxArchitecture(3072, 24, 19, 38, 64, 64, 4096, 768, 12288, True)
PROFILE = Profile(ShapeRange(16, 4096, 4096), ShapeRange(1, 512, 512), ShapeRange(1, 1, 2))
DOUBLE = frozenset(
    f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
)
LAYERS = DOUBLE | {"linear1", "linear2"}
DEFAULT = Precision(LAYERS, per_row=True, static=False)
RECIPES = {
    "per row, dynamic": DEFAULT,
    "per row, static": replace(DEFAULT, static=True),
    "per tensor, dynamic": replace(DEFAULT, per_row=False),
    "per tensor, static": replace(DEFAULT, per_row=False, static=True),
}
SMALL_CASES = [(SegmentName.SINGLE_OUT, words) for words in RECIPES] + [
    (name, "per row, dynamic") for name in SegmentName if name is not SegmentName.SINGLE_OUT
]
FULL_CASES = [(SegmentName.SINGLE_OUT, words) for words in ("per row, dynamic", "per tensor, static", "bf16")]
Built = dict[tuple[SegmentName, str], bytes | BuildFailed]


@pytest.fixture(scope="module", autouse=True)
def _needs_fp8() -> None:
    if reason := why_not_tensorrt_fp8(DEFAULT, current_gpu()):
        pytest.skip(reason)


def request(arch: FluxArchitecture, name: SegmentName, words: str, dtype: torch.dtype = torch.bfloat16) -> Request:
    precision = RECIPES.get(words, PLAIN)
    return _compiler(arch, precision, "unused", dtype).request(name)


def _compiler(arch: FluxArchitecture, precision: Precision, cache: str, dtype: torch.dtype) -> SegmentCompiler:
    precisions = dict.fromkeys(BlockKind, precision) if precision.fp8 else {}
    return SegmentCompiler(arch, dtype, DEVICE, PROFILE, EngineCache(cache), 1.5, Silent(), precisions)


def _build(arch: FluxArchitecture, cases: list[tuple[SegmentName, str]], folder: Path) -> Built:
    found: Built = {}
    with Builders(arch, DEVICE, 2, folder / "timing.bin") as builders:
        tickets = {builders.submit(request(arch, *case)): case for case in cases}
        for ticket in builders.finished(list(tickets)):
            if ticket >= 0:
                try:
                    found[tickets[ticket]] = builders.result(ticket) or b""
                except BuildFailed as error:
                    found[tickets[ticket]] = BuildFailed(f"{error} | {_log(builders)}")
    return found


def _log(builders: Builders) -> str:
    """The builder's last errors, for the report of this test."""
    lines = builders._log_path.read_text(errors="replace").splitlines()
    return " | ".join(line for line in lines if "rror" in line)[-1500:]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return _build(SMALL, SMALL_CASES, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return _build(FULL, FULL_CASES, tmp_path_factory.mktemp("full"))


def loaded(asked: Request, plan: bytes | BuildFailed) -> TensorRTSegment:
    if isinstance(plan, BuildFailed):
        pytest.fail(str(plan))
    return TensorRTSegment(asked, plan, tensorrt_runtime(), Scratch(DEVICE))


@pytest.mark.parametrize(("name", "words"), SMALL_CASES, ids=lambda value: getattr(value, "value", value))
def test_as_exact_as_eager_fp8(name: SegmentName, words: str, small: Built) -> None:
    asked = request(SMALL, name, words)
    segment = loaded(asked, small[name, words])
    inputs = asked.segment.random_inputs(2, 1000, 77, torch.bfloat16, DEVICE)
    with torch.no_grad():
        outputs = (segment(*inputs), asked.reference(*inputs))
    if name in WHOLE_SEGMENT.values():
        outputs = (added(outputs[0]), added(outputs[1]))
    differences = [relative_l2(s, e) for s, e in zip(*outputs, strict=True)]
    ratio = error_ratio(segment, asked)
    sys.stdout.write(f"\n{name.value}, {words}: {ratio:.3f} of eager FP8's error, {max(differences):.1e} from it\n")
    assert ratio < 1.2
    assert max(differences) < 3e-2


def test_the_scales_and_weights_are_inputs(small: Built) -> None:
    """Doubled scales double the product, other weights give another product: nothing is baked."""
    name, words = SegmentName.SINGLE_OUT, "per tensor, static"
    asked = request(SMALL, name, words)
    segment = loaded(asked, small[name, words])
    names = [bound.name for bound in asked.segment.weights]
    inputs = asked.segment.random_inputs(1, 256, 64, torch.bfloat16, DEVICE)
    first = len(asked.segment.activations)
    for changed in ("linear2.weight_scale", "linear2.weight", "linear2.input_scale"):
        index = first + names.index(changed)
        inputs[index] = inputs[index].flip(0) if changed == "linear2.weight" else inputs[index] * 2
        with torch.no_grad():
            (seen,), (expected,) = segment(*inputs), asked.reference(*inputs)
        assert relative_l2(seen, expected) < 1e-2, changed


@pytest.mark.parametrize(("name", "words"), FULL_CASES, ids=lambda value: getattr(value, "value", value))
def test_full_size(name: SegmentName, words: str, full: Built) -> None:
    asked = request(FULL, name, words)
    segment = loaded(asked, full[name, words])
    inputs = asked.segment.random_inputs(1, 4096, 512, torch.bfloat16, DEVICE)
    with torch.no_grad():
        ms = median_milliseconds(lambda: segment(*inputs), DEVICE)
        eager_ms = median_milliseconds(lambda: asked.reference(*inputs), DEVICE)
    ratio = error_ratio(segment, asked)
    sys.stdout.write(  # seen with -s
        f"\nfull size {name.value}, {words}: {ms:.3f} ms, eager {eager_ms:.3f} ms, error ratio {ratio:.3f}, "
        f"plan {segment.plan_bytes / 2**20:.2f} MiB, scratch {segment._scratch_bytes / 2**20:.0f} MiB\n"
    )
    assert ratio < 1.5


def test_the_plan_search_builds_checks_and_remembers_fp8_engines(tmp_path: Path) -> None:
    config = CompileConfig(Backend.TENSORRT, cache_folder=str(tmp_path))
    searches = [PlanSearch(_compiler(SMALL, DEFAULT, str(tmp_path), torch.bfloat16), config) for _ in range(2)]
    plans = [search.run()[0] for search in searches]
    assert {backend for _, backend, _ in plans[0].needed()} == {Backend.TENSORRT}
    assert plans[1] == plans[0]
    assert not searches[1].trials.measurements, "the second one found the plan in the cache"
    assert all(ratio < 1.2 for ratio in searches[0].compiler.error_ratios.values()), searches[0].compiler.error_ratios
