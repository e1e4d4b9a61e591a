"""Triton kernels that read or write FP8 weights outside compiled code, called eagerly. `fp8` holds the references."""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_rows import amax_bits, clamped, scale_from_bits

MAX_BATCH = 8
_ROWS_BLOCK = 8
_WIDTH_BLOCK = 512
"""512 bytes of a row are 16 for each thread of a warp: a row's sum stays inside one warp."""


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


@triton.jit
def _weight_only_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, rows, x_stride, weight_stride, scale_stride,
    BATCH: tl.constexpr, BATCH_BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program is ROWS_BLOCK outputs of every batch item: the weights are read once, sums are fp32."""
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    present = row < rows
    item = tl.arange(0, BATCH_BLOCK)
    total = tl.zeros((ROWS_BLOCK, BATCH_BLOCK), dtype=tl.float32)
    column = tl.arange(0, WIDTH_BLOCK)
    places = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    following = tl.load(places, mask=present[:, None] & (column < WIDTH)[None, :], other=0.0)
    for start in tl.static_range(0, WIDTH, WIDTH_BLOCK):
        weight, inside = following, start + column < WIDTH
        if start + WIDTH_BLOCK < WIDTH:
            # Asked for before this block is summed, so that memory has work meanwhile.
            mask = present[:, None] & (start + WIDTH_BLOCK + column < WIDTH)[None, :]
            following = tl.load(places + (start + WIDTH_BLOCK), mask=mask, other=0.0)
        for index in tl.static_range(BATCH):
            x = tl.load(x_ptr + index * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
            part = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
            total += tl.where(item[None, :] == index, part[:, None], 0.0)
    total = total * tl.load(scale_ptr + row * scale_stride, mask=present, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=present, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + item[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=present[:, None] & (item[None, :] < BATCH))


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


def weight_only_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """[B, N] in x's dtype: x [B, K], B up to MAX_BATCH, times `weight` [N, K] (E4M3), its scale [N, 1] or [1]."""
    (batch, width), rows = x.shape, weight.shape[0]
    x = _rows(x)
    out = torch.empty((batch, rows), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _weight_only_kernel[(triton.cdiv(rows, _ROWS_BLOCK),)](
            x, weight, weight_scale, weight_scale if bias is None else bias, out,
            rows, x.stride(0), weight.stride(0), weight_scale.stride(0) if weight_scale.numel() > 1 else 0,
            BATCH=batch, BATCH_BLOCK=triton.next_power_of_2(batch), WIDTH=width,
            ROWS_BLOCK=_ROWS_BLOCK, WIDTH_BLOCK=_WIDTH_BLOCK, HAS_BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
