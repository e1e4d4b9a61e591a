"""Triton kernels that read or write weights outside compiled code, called eagerly.

`fp8` and `storage` hold the references.
"""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .storage import GROUP, AddedProduct
from .triton_rows import amax_bits, clamped, scale_from_bits

MAX_BATCH = 8
_ROWS_BLOCK = 2
_MOST_GROUPS = 32
"""Groups of columns in a block: 3072 columns are 24."""
_RANK_BLOCK = 16


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
def _row_sums_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, up_ptr, projected_ptr, out_ptr, rows, rank,
    x_stride, weight_stride, scale_stride, up_stride, projected_stride,
    BATCH: tl.constexpr, BATCH_BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr, GROUP: tl.constexpr, RANK_BLOCK: tl.constexpr,
    SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr,
):  # fmt: skip
    """One program is ROWS_BLOCK outputs of every batch item: the weights are read once, sums are fp32.

    A block is GROUPS_BLOCK groups of GROUP columns: FLUX's whole rows, so that all of them are asked for at once.
    SCALES: 0 none, 1 one per row (or one), 2 one per group.
    """
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    present = row < rows
    item = tl.arange(0, BATCH_BLOCK)
    total = tl.zeros((ROWS_BLOCK, BATCH_BLOCK), dtype=tl.float32)
    group = tl.arange(0, GROUPS_BLOCK)
    column = (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]
    places = weight_ptr + row.to(tl.int64)[:, None, None] * weight_stride + column
    for start in tl.static_range(0, WIDTH, GROUPS_BLOCK * GROUP):
        inside = start + column < WIDTH
        weight = tl.load(places + start, mask=present[:, None, None] & inside, other=0.0)
        if SCALES == 2:
            wanted = present[:, None] & (start + group * GROUP < WIDTH)[None, :]
            scales = scale_ptr + row.to(tl.int64)[:, None] * scale_stride + (start // GROUP + group)[None, :]
            scale = tl.load(scales, mask=wanted, other=0.0)
        for index in tl.static_range(BATCH):
            # Of the weight's shape, so that it is where the weight is: else threads exchange it through shared memory.
            inputs = x_ptr + index * x_stride + start + column + (row * 0)[:, None, None]
            x = tl.load(inputs, mask=present[:, None, None] & inside, other=0.0).to(tl.float32)
            sums = tl.sum(weight.to(tl.float32) * x, axis=2)
            part = tl.sum(sums * scale if SCALES == 2 else sums, axis=1)
            total += tl.where(item[None, :] == index, part[:, None], 0.0)
    if SCALES == 1:
        total = total * tl.load(scale_ptr + row * scale_stride, mask=present, other=0.0)[:, None]
    if HAS_LOW_RANK:
        # In blocks of one size: a sum does not depend on how many ranks other LoRAs have.
        for first in range(0, rank, RANK_BLOCK):
            place = first + tl.arange(0, RANK_BLOCK)
            ups = up_ptr + row.to(tl.int64)[:, None] * up_stride + place[None, :]
            up = tl.load(ups, mask=present[:, None] & (place < rank)[None, :], other=0.0).to(tl.float32)
            for index in tl.static_range(BATCH):
                h = tl.load(projected_ptr + index * projected_stride + place, mask=place < rank, other=0.0)
                part = tl.sum(up * h[None, :], axis=1)
                total += tl.where(item[None, :] == index, part[:, None], 0.0)
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


def rows_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, added: AddedProduct | None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`storage.linear` as [B, N] in `dtype` (x's own): x [B, K], B up to MAX_BATCH, times `weight` [N, K]."""
    (batch, width), rows = x.shape, weight.shape[0]
    x, weight = _rows(x), _rows(weight)
    out = torch.empty((batch, rows), dtype=dtype or x.dtype, device=x.device)
    groups = min(_MOST_GROUPS, triton.next_power_of_2(triton.cdiv(width, GROUP)))
    up, projected = (weight, weight) if added is None else (_rows(added.up), _rows(added.projected))
    with torch.cuda.device_of(x):
        _row_sums_kernel[(triton.cdiv(rows, _ROWS_BLOCK),)](
            x, weight, weight if scale is None else scale, weight if bias is None else bias, up, projected, out,
            rows, 0 if added is None else up.shape[1], x.stride(0), weight.stride(0),
            0 if scale is None or scale.numel() == 1 else scale.stride(0), up.stride(0), projected.stride(0),
            BATCH=batch, BATCH_BLOCK=triton.next_power_of_2(batch), WIDTH=width, ROWS_BLOCK=_ROWS_BLOCK,
            GROUPS_BLOCK=groups, GROUP=GROUP, RANK_BLOCK=_RANK_BLOCK,
            SCALES=0 if scale is None else 2 if scale.ndim == 2 and scale.shape[1] > 1 else 1,
            HAS_BIAS=bias is not None, HAS_LOW_RANK=added is not None, num_warps=4,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
