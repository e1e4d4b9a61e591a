"""The kernels that merge low-rank products against sums in fp64, and refits that take them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import low_rank
from trt_core import low_rank_merge, weights
from trt_core.config import BaseWeights
from trt_core.flux import fp8
from trt_core.lora.changes import Difference, LowRank, Patch, merged
from trt_core.low_rank import Term
from trt_core.weights import BoundWeights, WeightPatches

pytest.importorskip("triton")
DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIGITS = {BF16: 8, FP16: 11, FP32: 24}
SMALLEST_STEP = {BF16: 2.0**-133, FP16: 2.0**-24, FP32: 2.0**-149}
FP32_ERROR = 2.0**-18
"""Of the sum of all absolute values: rounding of a few dozen sums in fp32. Plain tf32 would give 2 ** -12."""
ODD, ALIGNED, WIDE = (131, 300), (192, 512), (16, 15360)
COMBINATIONS = [
    (BF16, BF16, 16, ALIGNED),
    (BF16, BF16, 1, ODD),
    (BF16, BF16, 128, ALIGNED),
    (BF16, FP16, 4, ODD),
    (BF16, FP32, 16, ALIGNED),
    (BF16, FP32, 40, ODD),
    (FP16, BF16, 40, ODD),
    (FP16, FP16, 16, WIDE),
    (FP32, BF16, 16, ODD),
    (FP32, FP32, 128, ALIGNED),
]
"""dtype of the weight, dtype of the factors, rank, shape. Not all of them: each kernel takes a second to build."""
Patches = Sequence[tuple[Patch, float]]
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8 below 8.9"
)


@pytest.fixture
def kernels() -> ModuleType:
    from trt_core import triton_merge

    return triton_merge


def normal(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of a wider and taller matrix."""
    return normal(shape[0] + 3, shape[1] + 16, dtype=dtype, seed=seed)[2:-1, : shape[1]]


def term(shape: tuple[int, int], rank: int, dtype: torch.dtype, factor: float, seed: int = 1) -> Term:
    up, down = normal(shape[0], rank, dtype=dtype, seed=seed), normal(rank, shape[1], dtype=dtype, seed=seed + 50)
    return Term(up * rank**-0.5, down * 0.3, factor)


def exact(base: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """The sum in fp64, and the sum of the absolute values in it."""
    total, size = base.double(), base.double().abs()
    for up, down, factor in terms:
        total = total + factor * (up.double() @ down.double())
        size = size + abs(factor) * (up.double().abs() @ down.double().abs())
    return total, size


def assert_rounded_once(seen: Tensor, base: Tensor, terms: Sequence[Term]) -> None:
    """Within half a step of the dtype around the exact sum, but for the error of sums in fp32."""
    total, size = exact(base, terms)
    steps = torch.exp2(torch.frexp(total).exponent.double() - DIGITS[seen.dtype]).clamp(min=SMALLEST_STEP[seen.dtype])
    assert ((seen.double() - total).abs() <= 0.5 * steps + FP32_ERROR * size).all()


def canvas(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix of sevens and the place of `shape` inside it."""
    whole = torch.full((shape[0] + 4, shape[1] + 16), 7.0, device=DEVICE).to(dtype)
    return whole, whole[2:-2, : shape[1]]


def is_untouched(whole: Tensor, inner: Tensor) -> bool:
    inner.fill_(7.0)
    return bool((whole == 7).all())


# -- bf16, fp16, fp32 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "factors", "rank", "shape"), COMBINATIONS)
def test_the_sum_is_rounded_once(
    kernels: ModuleType, dtype: torch.dtype, factors: torch.dtype, rank: int, shape: tuple[int, int]
) -> None:
    base, whole_and_out = strided(shape, dtype), canvas(shape, dtype)
    whole, out = whole_and_out
    for factor in (1.0, -0.37):
        terms = [term(shape, rank, factors, factor)]
        kernels.merge_low_rank(base, terms, out)
        assert_rounded_once(out, base, terms)
        first = out.clone()
        kernels.merge_low_rank(base, terms, out)
        assert torch.equal(first, out), "the same inputs give the same bits"
    assert is_untouched(whole, out)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_stack_is_one_sum(kernels: ModuleType, count: int) -> None:
    """Ranks and dtypes of their own; each changes the result, so none may be dropped or mixed up."""
    shape, dtypes = ALIGNED, (BF16, FP16, FP32, BF16)
    terms = [term(shape, 4 + 7 * (i % 3), dtypes[i % 4], 0.3 - 0.17 * i, seed=i) for i in range(count)]
    base, out = normal(*shape, dtype=BF16), torch.empty(shape, dtype=BF16, device=DEVICE)
    kernels.merge_low_rank(base, terms, out)
    assert_rounded_once(out, base, terms)


def test_factors_of_two_dtypes(kernels: ModuleType) -> None:
    shape = ALIGNED
    mixed = Term(normal(shape[0], 8, dtype=FP32), normal(8, shape[1], dtype=BF16, seed=1), 0.1)
    base, out = normal(*shape, dtype=FP32), torch.empty(shape, device=DEVICE)
    kernels.merge_low_rank(base, [mixed], out)
    assert_rounded_once(out, base, [mixed])


def test_products_of_fp32_factors_are_not_tf32(kernels: ModuleType) -> None:
    """A base of zeros shows the product alone."""
    shape = ALIGNED
    terms, base = [term(shape, 16, FP32, 1.0)], torch.zeros(shape, device=DEVICE)
    out = torch.empty_like(base)
    kernels.merge_low_rank(base, terms, out)
    total, size = exact(base, terms)
    assert ((out.double() - total).abs() / size).max() < 2.0**-19


def test_the_kernels_work_here(kernels: ModuleType) -> None:
    assert kernels.why_not(torch.device(DEVICE, 0)) is None


# -- FP8 ---------------------------------------------------------------------------------------------------------------


def fp8_canvas(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = torch.zeros(shape[0] + 5, shape[1], device=DEVICE).to(fp8.FP8)
    scales = torch.zeros(shape[0] + 5, 1, device=DEVICE)
    return whole, scales, whole[3:-2], scales[3:-2]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8).cpu()


@needs_fp8
@pytest.mark.parametrize(("dtype", "factors", "rank", "shape"), COMBINATIONS[::2])
def test_fp8_is_the_sum_with_a_fresh_scale(
    kernels: ModuleType, dtype: torch.dtype, factors: torch.dtype, rank: int, shape: tuple[int, int]
) -> None:
    """Scales to the last bits of fp32; a value on the edge between two E4M3 numbers may become its neighbour."""
    base, terms = strided(shape, dtype), [term(shape, rank, factors, -0.37)]
    whole, scales, weight, scale = fp8_canvas(shape)
    kernels.merge_low_rank_fp8(base, terms, weight, scale)
    total = exact(base, terms)[0].float()
    assert torch.allclose(scale, fp8.row_scale(total), rtol=1e-5)
    q, expected = bits(weight).int(), bits(fp8.quantize_tensor(total, scale)).int()
    tiny = (weight.float().abs() < 2.0**-8).cpu()
    assert (q - expected).abs()[~tiny].max() <= 1
    assert (q != expected).float().mean() < 2e-3
    assert not whole[:3].float().any()
    assert not whole[-2:].float().any()
    assert not scales[:3].any()
    assert not scales[-2:].any()


@needs_fp8
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(33, 40), (192, 3072), WIDE])
def test_fp8_has_the_bits_of_merge_quantize(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Each row of `up` picks one row of `down`: the fp32 sum is exact, so scale and rounding must be, too."""
    rows = torch.logspace(-6, 3, shape[0], device=DEVICE)[:, None]
    base, down = (normal(*shape) * rows).to(dtype), normal(16, shape[1], dtype=BF16, seed=1)
    up = torch.eye(16, device=DEVICE)[torch.arange(shape[0], device=DEVICE) % 16].to(BF16)
    base[3], up[3] = 0, 0
    _, _, weight, scale = fp8_canvas(shape)
    kernels.merge_low_rank_fp8(base, [Term(up, down, 1.0)], weight, scale)
    expected = fp8.merge_quantize(base.cpu(), up.cpu().float() @ down.cpu().float(), 1.0)
    assert torch.equal(scale.cpu(), expected[1])
    assert torch.equal(bits(weight), bits(expected[0]))
    kernels.merge_low_rank_fp8(base, [Term(torch.zeros_like(up), down, 1.0)], weight, scale)
    expected = fp8.merge_quantize(base, None, 1.0)
    assert torch.equal(scale, expected[1])
    assert torch.equal(weight.float(), expected[0].float()), "but for the sign of zeros: -0 + 0 is 0"


@needs_fp8
def test_fp8_stacks_are_one_sum(kernels: ModuleType) -> None:
    shape = ALIGNED
    terms = [term(shape, rank, dtype, 0.4, seed=rank) for rank, dtype in ((4, BF16), (16, FP16), (40, BF16), (8, FP32))]
    base, (_, _, weight, scale) = normal(*shape, dtype=BF16), fp8_canvas(shape)
    kernels.merge_low_rank_fp8(base, terms, weight, scale)
    total = exact(base, terms)[0].float()
    assert torch.allclose(scale, fp8.row_scale(total), rtol=1e-5)
    assert (bits(weight) != bits(fp8.quantize_tensor(total, scale))).float().mean() < 2e-3


# -- refits ------------------------------------------------------------------------------------------------------------

SHAPE = (192, 512)
QKV = ((0, 64), (64, 128), (128, 192))


def patch(rows: tuple[int, int] | None, seed: int, strength: float = 0.7, rank: int = 16) -> tuple[Patch, float]:
    size = (SHAPE[0] if rows is None else rows[1] - rows[0], SHAPE[1])
    change = low_rank(size, rank, torch.Generator().manual_seed(seed), scale=0.3)
    return Patch("w", rows, change), strength


STACKS: dict[str, Patches] = {
    "q, k, v": [patch(rows, seed) for seed, rows in enumerate(QKV)],
    "k alone": [patch(QKV[1], 1, -1.3)],
    "two of them": [patch(None, 1), patch(None, 2, -0.4)],
    "fused and q, k, v": [patch(None, 1), *(patch(rows, 2 + seed, -0.4) for seed, rows in enumerate(QKV))],
    "overlapping": [patch((0, 128), 1), patch((64, 192), 2, 0.2), patch((32, 80), 3, 1.5)],
    "strength 0": [patch(None, 1, 0.0)],
    "one of strength 0": [patch(None, 1, 0.0), patch(QKV[2], 2)],
}


def moved(patches: Patches) -> Patches:
    return [(part.to(DEVICE), strength) for part, strength in patches]


def bound() -> BoundWeights:
    return BoundWeights({"w": normal(*SHAPE, dtype=BF16)}, BaseWeights.GPU)


def refit(loaded: BoundWeights, patches: Patches) -> Tensor:
    loaded.refit({"w": WeightPatches(object(), tuple(patches))})
    return loaded.tensors["w"]


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit that would not take the kernels fails."""
    for name in ("disjoint", "merged"):
        monkeypatch.delattr(weights, name)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("name", STACKS)
def test_a_refit_is_the_sum_of_the_patches(name: str) -> None:
    base, seen = bound().tensors["w"], refit(bound(), moved(STACKS[name]))
    total = base.cpu().double()
    for part, strength in STACKS[name]:
        start, stop = part.rows or (0, SHAPE[0])
        assert isinstance(part.change, LowRank)
        factor = strength * part.change.scale
        total[start:stop] += factor * (part.change.up.double() @ part.change.down.double())
    steps = torch.exp2(torch.frexp(total).exponent.double() - DIGITS[BF16])
    assert ((seen.cpu().double() - total).abs() <= 0.5 * steps + 1e-5).all()


@pytest.mark.usefixtures("kernels_only")
def test_rows_without_a_patch_have_the_bits_of_the_base() -> None:
    base = bound().tensors["w"]
    base[0, 0] = -0.0
    assert torch.equal(bits(refit(bound(), moved(STACKS["strength 0"]))), bits(bound().tensors["w"]))
    seen = refit(BoundWeights({"w": base.clone()}, BaseWeights.GPU), moved(STACKS["k alone"]))
    assert torch.equal(bits(seen[:64]), bits(base[:64]))
    assert torch.equal(bits(seen[128:]), bits(base[128:]))
    assert not torch.equal(seen[64:128], base[64:128])


@pytest.mark.usefixtures("kernels_only")
def test_a_to_b_is_a_fresh_b() -> None:
    loaded = bound()
    for name in (*STACKS, *reversed(STACKS)):
        assert torch.equal(refit(loaded, moved(STACKS[name])), refit(bound(), moved(STACKS[name]))), name
    loaded.restore()
    assert torch.equal(loaded.tensors["w"], bound().tensors["w"])


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_factors_in_host_memory_and_in_other_dtypes(dtype: torch.dtype) -> None:
    """As ComfyUI and LoRA files bring them; where they lie changes no bit."""
    part, strength = patch(None, 1)
    assert isinstance(part.change, LowRank)
    change = LowRank(part.change.down.to(dtype), part.change.up.to(dtype), part.change.scale)
    seen = refit(bound(), [(Patch("w", None, change), strength)])
    assert torch.equal(seen, refit(bound(), moved([(Patch("w", None, change), strength)])))
    assert_rounded_once(
        seen, bound().tensors["w"], [Term(change.up.to(DEVICE), change.down.to(DEVICE), strength * change.scale)]
    )


def test_other_changes_take_the_way_they_took() -> None:
    patches = moved([patch(None, 1), (Patch("w", QKV[0], Difference(torch.ones(64, SHAPE[1]))), 0.5)])
    base = bound().tensors["w"]
    assert not low_rank_merge.merge(torch.empty_like(base), base, patches)
    assert torch.equal(refit(bound(), patches), merged(base, patches).to(BF16))


@needs_fp8
@pytest.mark.parametrize("name", STACKS)
def test_fp8_rows_are_merged_one_by_one(name: str) -> None:
    base, patches = bound().tensors["w"], moved(STACKS[name])
    _, _, weight, scale = fp8_canvas(SHAPE)
    assert low_rank_merge.merge_fp8((weight, scale), base, patches)
    total = merged(base, patches)
    assert torch.allclose(scale, fp8.row_scale(total), rtol=1e-5)
    assert (bits(weight) != bits(fp8.quantize_tensor(total, scale))).float().mean() < 2e-3
    if name == "strength 0":
        assert torch.equal(bits(weight), bits(fp8.merge_quantize(base, None, 1.0)[0]))
