"""Numbers for tests of merged low-rank products, and how near to the exact sum a merged weight must be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trt_core.flux import fp8
from trt_core.low_rank import Term
from trt_core.merge_table import Fp8Place, Merge, alike

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIGITS = {BF16: 8, FP16: 11, FP32: 24}
SMALLEST_STEP = {BF16: 2.0**-133, FP16: 2.0**-24, FP32: 2.0**-149}
FP32_ERROR = 2.0**-18
"""Of the sum of all absolute values: rounding of a few dozen sums in fp32. Plain tf32 would give 2 ** -12."""
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8 below 8.9"
)


def merge_low_rank(base: Tensor, terms: Sequence[Term], out: Tensor) -> None:
    """One merge of all rows by the kernel."""
    from trt_core.triton_merge import merge_all

    merge_all([Merge(0, base.shape[0], base, out, alike(terms))])


def merge_low_rank_fp8(base: Tensor, terms: Sequence[Term], weight: Tensor, scale: Tensor) -> None:
    """The same to E4M3."""
    from trt_core.triton_merge import merge_all

    merge_all([Merge(0, base.shape[0], base, Fp8Place(weight, scale), alike(terms))])


def normal(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


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


def fp8_canvas(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = torch.zeros(shape[0] + 5, shape[1], device=DEVICE).to(fp8.FP8)
    scales = torch.zeros(shape[0] + 5, 1, device=DEVICE)
    return whole, scales, whole[3:-2], scales[3:-2]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8).cpu()
