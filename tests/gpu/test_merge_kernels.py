"""The kernels that merge low-rank products against sums in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trt_core.flux import fp8
from trt_core.low_rank import Term
from trt_core.merge_table import Fp8Place, Merge, alike

from .merging import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    assert_rounded_once,
    bits,
    exact,
    fp8_canvas,
    merge_low_rank,
    merge_low_rank_fp8,
    needs_fp8,
    normal,
)

pytest.importorskip("triton")
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


def strided(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of a wider and taller matrix."""
    return normal(shape[0] + 3, shape[1] + 16, dtype=dtype, seed=seed)[2:-1, : shape[1]]


def term(shape: tuple[int, int], rank: int, dtype: torch.dtype, factor: float, seed: int = 1) -> Term:
    up, down = normal(shape[0], rank, dtype=dtype, seed=seed), normal(rank, shape[1], dtype=dtype, seed=seed + 50)
    return Term(up * rank**-0.5, down * 0.3, factor)


def canvas(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix of sevens and the place of `shape` inside it."""
    whole = torch.full((shape[0] + 4, shape[1] + 16), 7.0, device=DEVICE).to(dtype)
    return whole, whole[2:-2, : shape[1]]


def is_untouched(whole: Tensor, inner: Tensor) -> bool:
    inner.fill_(7.0)
    return bool((whole == 7).all())


# -- bf16, fp16, fp32 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "factors", "rank", "shape"), COMBINATIONS)
def test_the_sum_is_rounded_once(dtype: torch.dtype, factors: torch.dtype, rank: int, shape: tuple[int, int]) -> None:
    base, whole_and_out = strided(shape, dtype), canvas(shape, dtype)
    whole, out = whole_and_out
    for factor in (1.0, -0.37):
        terms = [term(shape, rank, factors, factor)]
        merge_low_rank(base, terms, out)
        assert_rounded_once(out, base, terms)
        first = out.clone()
        merge_low_rank(base, terms, out)
        assert torch.equal(first, out), "the same inputs give the same bits"
    assert is_untouched(whole, out)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_stack_is_one_sum(count: int) -> None:
    """Ranks and dtypes of their own; each changes the result, so none may be dropped or mixed up."""
    shape, dtypes = ALIGNED, (BF16, FP16, FP32, BF16)
    terms = [term(shape, 4 + 7 * (i % 3), dtypes[i % 4], 0.3 - 0.17 * i, seed=i) for i in range(count)]
    base, out = normal(*shape, dtype=BF16), torch.empty(shape, dtype=BF16, device=DEVICE)
    merge_low_rank(base, terms, out)
    assert_rounded_once(out, base, terms)


def test_factors_of_two_dtypes() -> None:
    shape = ALIGNED
    mixed = Term(normal(shape[0], 8, dtype=FP32), normal(8, shape[1], dtype=BF16, seed=1), 0.1)
    base, out = normal(*shape, dtype=FP32), torch.empty(shape, device=DEVICE)
    merge_low_rank(base, [mixed], out)
    assert_rounded_once(out, base, [mixed])


def test_products_of_fp32_factors_are_not_tf32() -> None:
    """A base of zeros shows the product alone."""
    shape = ALIGNED
    terms, base = [term(shape, 16, FP32, 1.0)], torch.zeros(shape, device=DEVICE)
    out = torch.empty_like(base)
    merge_low_rank(base, terms, out)
    total, size = exact(base, terms)
    assert ((out.double() - total).abs() / size).max() < 2.0**-19


def test_the_kernels_work_here() -> None:
    from trt_core import triton_merge

    assert triton_merge.why_not(torch.device(DEVICE, 0)) is None


# -- FP8 ---------------------------------------------------------------------------------------------------------------


@needs_fp8
@pytest.mark.parametrize(("dtype", "factors", "rank", "shape"), COMBINATIONS[::2])
def test_fp8_is_the_sum_with_a_fresh_scale(
    dtype: torch.dtype, factors: torch.dtype, rank: int, shape: tuple[int, int]
) -> None:
    """Scales to the last bits of fp32; a value on the edge between two E4M3 numbers may become its neighbour."""
    base, terms = strided(shape, dtype), [term(shape, rank, factors, -0.37)]
    whole, scales, weight, scale = fp8_canvas(shape)
    merge_low_rank_fp8(base, terms, weight, scale)
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
def test_fp8_has_the_bits_of_merge_quantize(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Each row of `up` picks one row of `down`: the fp32 sum is exact, so scale and rounding must be, too."""
    rows = torch.logspace(-6, 3, shape[0], device=DEVICE)[:, None]
    base, down = (normal(*shape) * rows).to(dtype), normal(16, shape[1], dtype=BF16, seed=1)
    up = torch.eye(16, device=DEVICE)[torch.arange(shape[0], device=DEVICE) % 16].to(BF16)
    base[3], up[3] = 0, 0
    _, _, weight, scale = fp8_canvas(shape)
    merge_low_rank_fp8(base, [Term(up, down, 1.0)], weight, scale)
    expected = fp8.merge_quantize(base.cpu(), up.cpu().float() @ down.cpu().float(), 1.0)
    assert torch.equal(scale.cpu(), expected[1])
    assert torch.equal(bits(weight), bits(expected[0]))
    merge_low_rank_fp8(base, [Term(torch.zeros_like(up), down, 1.0)], weight, scale)
    expected = fp8.merge_quantize(base, None, 1.0)
    assert torch.equal(scale, expected[1])
    assert torch.equal(weight.float(), expected[0].float()), "but for the sign of zeros: -0 + 0 is 0"


@needs_fp8
def test_fp8_stacks_are_one_sum() -> None:
    shape = ALIGNED
    terms = [term(shape, rank, dtype, 0.4, seed=rank) for rank, dtype in ((4, BF16), (16, FP16), (40, BF16), (8, FP32))]
    base, (_, _, weight, scale) = normal(*shape, dtype=BF16), fp8_canvas(shape)
    merge_low_rank_fp8(base, terms, weight, scale)
    total = exact(base, terms)[0].float()
    assert torch.allclose(scale, fp8.row_scale(total), rtol=1e-5)
    assert (bits(weight) != bits(fp8.quantize_tensor(total, scale))).float().mean() < 2e-3


def many(seed: int) -> list[Merge]:
    """Of several kinds and sizes, each to its own place."""
    merges = []
    for index, (shape, rank, dtype) in enumerate(
        ((ALIGNED, 16, BF16), ((64, 3072), 16, BF16), (ODD, 4, FP16), ((128, 256), 40, FP32), (WIDE, 16, BF16)) * 3
    ):
        base = normal(*shape, dtype=BF16, seed=seed + index)
        terms = alike([term(shape, rank, dtype, 0.4 - index, seed=seed + 7 * index + i) for i in range(1 + index % 2)])
        out = torch.empty_like(base)
        if index % 3 and torch.cuda.get_device_capability() >= (8, 9):
            mean, correction = normal(shape[1], seed=index), torch.empty(shape[0], device=DEVICE)
            scale = torch.empty(shape[0], 1, device=DEVICE)
            out = Fp8Place(out.to(fp8.FP8), scale, *((mean, correction) if index % 2 else ()))
        merges.append(Merge(0, shape[0], base, out, terms))
    return merges


def test_many_at_once_have_the_bits_of_each_alone() -> None:
    from trt_core.triton_merge import merge_all

    together, alone = many(3), many(3)
    merge_all(together)
    for merge in alone:
        merge_all([merge])
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(*((m.out if isinstance(m.out, tuple) else (m.out,)) for m in (one, other)), strict=True):
            assert (a is None and b is None) or torch.equal(bits(a), bits(b))
    assert sum(isinstance(merge.out, Fp8Place) for merge in together) in (0, 10)


@needs_fp8
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("shape", [ALIGNED, ODD, WIDE])
def test_what_rounding_takes_from_the_mean_output(shape: tuple[int, int], rank: int) -> None:
    """With no term it is the base's own; rows outside keep what they had."""
    from trt_core.triton_merge import merge_all

    base, mean = normal(*shape, dtype=BF16), normal(shape[1], seed=5) + 0.5
    terms = (term(shape, rank, BF16, 0.7),) if rank else ()
    terms = tuple(t._replace(up=t.up[8:]) for t in terms)
    correction = torch.full((shape[0],), 7.0, device=DEVICE)
    weight, scale = base.to(fp8.FP8), torch.empty(shape[0], 1, device=DEVICE)
    merge_all([Merge(8, shape[0], base, Fp8Place(weight, scale, mean, correction), terms)])
    total = base[8:].double() + sum(t.factor * (t.up.double() @ t.down.double()) for t in terms)
    lost = (total - weight[8:].double() * scale[8:].double()) @ mean.double()
    assert torch.allclose(correction[8:].double(), lost, rtol=1e-3, atol=1e-4 * float(lost.abs().max()))
    assert (correction[:8] == 7.0).all()
    assert lost.abs().max() > 0.01


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16], ids=str)
def test_the_usual_lora_compiles_nothing_once_prepared(factors: torch.dtype, rank: int) -> None:
    from trt_core import low_rank_merge, triton_merge
    from trt_core.host import Silent
    from trt_core.low_rank import Term

    def compiled() -> int:
        kernels = (triton_merge._merge_low_rank_kernel, triton_merge._merge_low_rank_fp8_kernel)
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    low_rank_merge.prepare(torch.device("cuda", 0), torch.bfloat16, True, Silent())
    before = compiled()
    base = torch.randn(9216, 3072, device="cuda", dtype=torch.bfloat16)
    term = Term(*(torch.randn(s, device="cuda").to(factors) for s in ((3072, rank), (rank, 3072))), 0.5)
    merge_low_rank(base[3072:6144], [term], base[3072:6144])
    weight, scale = torch.empty_like(base, dtype=torch.float8_e4m3fn), torch.empty(9216, 1, device="cuda")
    merge_low_rank_fp8(base[3072:6144], [term], weight[3072:6144], scale[3072:6144])
    assert compiled() == before > 0
