"""The Triton kernel that merges into E4M3 rows outside compiled code, called eagerly; `fp8` holds the reference."""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_rows import amax_bits, clamped, scale_from_bits


@triton.jit
def _merge_kernel(
    base_ptr, delta_ptr, weight_ptr, scale_ptr, factor, base_stride, delta_stride, weight_stride, scale_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """One program is one row: base + factor * delta in fp32, its scale, and the row divided by it in E4M3."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(base_ptr + row * base_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = x + factor * delta
    scale = scale_from_bits(amax_bits(x))
    q = clamped(tl.div_rn(x, scale))
    tl.store(weight_ptr + row * weight_stride + column, q.to(weight_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row * scale_stride, scale)


def merge_quantize_rows(base: Tensor, delta: Tensor | None, factor: float, weight: Tensor, scale: Tensor) -> None:
    """Writes rows of base + factor * delta to `weight` [N, K] (E4M3) and their scales to `scale` [N, 1] (fp32).

    base and delta [N, K] and `weight` may be strided over rows. Bit for bit as plain PyTorch: no fused multiply-add,
    and IEEE division.
    """
    rows, width = base.shape
    base, change = _rows(base), _rows(base if delta is None else delta)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(base):
        _merge_kernel[(rows,)](
            base, change, weight, scale, float(factor),
            base.stride(0), change.stride(0), weight.stride(0), scale.stride(0),
            WIDTH=width, BLOCK=block, HAS_DELTA=delta is not None, num_warps=4 if block <= 4096 else 8,
            enable_fp_fusion=False,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
