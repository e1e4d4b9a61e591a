"""Triton kernels that merge low-rank products into weights without writing the product to memory.

PyTorch needs three passes for it: a product in fp32, its factor, and a sum of bf16 and fp32. For a LoRA on all 304
matrices of FLUX on an H100 they took 78 ms, where reading the base and writing the result takes 16 ms.
`low_rank_merge` chooses between these kernels and PyTorch.
"""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .flux.triton_rows import clamped, scale_from_bits
from .low_rank import Term

_ROWS_BLOCK, _WIDTH_BLOCK = 64, 128
"""With 8 warps 64 registers a thread for one LoRA, so 4 programs on a multiprocessor, with 64 KB of the base on their
way; 128 rows would take 154 registers and leave one program."""
_FP8_ROWS_BLOCK = 16
"""The fewest that tensor cores take: 3072 rows are 192 programs for the 132 multiprocessors of an H100, and what the
second pass over these rows reads again is still in its L2 cache."""
_DEEPEST = 32
"""Ranks that one step of a product takes at most: with 64, four LoRAs need more shared memory than there is."""


@triton.jit
def _product(
    up_ptr, down_ptr, rank, row, column, rows, width, DEPTH: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """A tile of up @ down in fp32. Factors of 16 bits have exact products; of fp32 ones, three tf32 products keep 21
    bits and more, where one would keep 10."""
    depth = tl.arange(0, DEPTH)
    ups = up_ptr + row.to(tl.int64)[:, None] * rank + depth[None, :]
    downs = down_ptr + depth[:, None] * width + column[None, :]
    up = tl.load(ups, mask=(row < rows)[:, None] & (depth < rank)[None, :], other=0.0)
    down = tl.load(downs, mask=(depth < rank)[:, None] & (column < width)[None, :], other=0.0)
    total = _dot(up, down)
    if DEEP:
        for start in range(DEPTH, rank, DEPTH):
            left = depth < rank - start
            up = tl.load(ups + start, mask=(row < rows)[:, None] & left[None, :], other=0.0)
            down = tl.load(downs + start * width, mask=left[:, None] & (column < width)[None, :], other=0.0)
            total += _dot(up, down)
    return total


@triton.jit
def _dot(up, down):
    if up.dtype == down.dtype:
        return tl.dot(up, down, input_precision="tf32x3")
    else:
        return tl.dot(up.to(tl.float32), down.to(tl.float32), input_precision="tf32x3")


@triton.jit
def _merged(
    base_ptr, base_stride, ups, downs, ranks, factors, row, column, rows, width,
    COUNT: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """A tile of base + sum of factor * (up @ down) in fp32, in the order of the terms."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(base_ptr + row.to(tl.int64)[:, None] * base_stride + column[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    for index in tl.static_range(COUNT):
        product = _product(ups[index], downs[index], ranks[index], row, column, rows, width, DEPTH, DEEP)
        x = tl.fma(product, factors[index] + tl.zeros_like(x), x)
    return x


@triton.jit
def _quotient(x, divisor, inverse):
    """x / divisor, rounded as IEEE does, where `inverse` is 1 / divisor so rounded: two corrections by the exact rest.

    By Markstein's theorem the second one rounds correctly, because the first leaves less than one step of fp32. It is
    what `tl.div_rn` does, without its branch for numbers whose rest would be denormal: E4M3 rounds those to zero.
    """
    q = x * inverse
    q = tl.fma(tl.fma(-q, divisor, x), inverse, q)
    return tl.fma(tl.fma(-q, divisor, x), inverse, q)


@triton.jit
def _merge_low_rank_kernel(
    base_ptr, out_ptr, ups, downs, ranks, factors, rows, width, base_stride, out_stride,
    COUNT: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program is one tile."""
    row = tl.program_id(1) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    column = tl.program_id(0) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    x = _merged(
        base_ptr, base_stride, ups, downs, ranks, factors, row, column, rows, width, COUNT, DEPTH, DEEP
    )  # fmt: skip
    places = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(places, x.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def _merge_low_rank_fp8_kernel(
    base_ptr, weight_ptr, scale_ptr, ups, downs, ranks, factors, rows, width,
    base_stride, weight_stride, scale_stride,
    COUNT: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program is ROWS_BLOCK whole rows: their largest numbers, then the same sums again, divided by the scales."""
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    largest = tl.zeros((ROWS_BLOCK, WIDTH_BLOCK), dtype=tl.int32)
    for start in tl.range(0, width, WIDTH_BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, WIDTH_BLOCK)
        x = _merged(
            base_ptr, base_stride, ups, downs, ranks, factors, row, column, rows, width, COUNT, DEPTH, DEEP
        )  # fmt: skip
        # As `triton_rows.amax_bits`. Columns that are not there are 0, or NaN where `up` makes NaN of the whole row.
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = scale_from_bits(tl.max(largest, axis=1))
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row * scale_stride, scale, mask=row < rows)
    for start in tl.range(0, width, WIDTH_BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, WIDTH_BLOCK)
        x = _merged(
            base_ptr, base_stride, ups, downs, ranks, factors, row, column, rows, width, COUNT, DEPTH, DEEP
        )  # fmt: skip
        q = clamped(_quotient(x, scale[:, None], inverse[:, None]))
        places = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        tl.store(places, q.to(weight_ptr.dtype.element_ty), mask=inside)


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU: tried on small whole numbers, whose sums are exact. None where they can.

    Triton needs the machine's C compiler, which many installations lack, and an old one takes no tuples of arguments
    (TypeError). Raises `torch.OutOfMemoryError`.
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "products of bf16 and tf32 need an NVIDIA GPU of compute capability 8.0."
    base = torch.arange(-8, 8, dtype=torch.bfloat16).expand(16, 16)
    term = Term(base.t().contiguous() / 8, base.contiguous(), 2.0)
    out = torch.empty_like(term.down, device=device)
    try:
        merge_low_rank(term.down.to(device), [Term(term.up.to(device), term.down.to(device), term.factor)], out)
        seen = out.cpu()
    except torch.OutOfMemoryError:
        raise
    except (TritonError, subprocess.CalledProcessError, OSError, RuntimeError, TypeError) as error:
        return f"it does not compile here ({error})."
    expected = base.float() + 2 * (term.up.float() @ base.float())
    return None if torch.equal(seen.float(), expected.bfloat16().float()) else "its sums are wrong on this GPU."


def merge_low_rank(base: Tensor, terms: Sequence[Term], out: Tensor) -> None:
    """Writes base + sum of factor * (up @ down) to `out`: summed in fp32 in this order, rounded once to its dtype.

    base and `out` [N, K], bf16, fp16 or fp32, may be strided over rows and may be the same tensor; `terms` has one or
    more, with up [N, r] and down [r, K] on the same device. The same inputs give the same bits.
    """
    rows, width = base.shape
    grid = (-(-width // _WIDTH_BLOCK), -(-rows // _ROWS_BLOCK))
    with torch.cuda.device_of(base):
        _merge_low_rank_kernel[grid](
            base, out, *_arguments(terms), rows, width, base.stride(0), out.stride(0), **_constants(terms),
            ROWS_BLOCK=_ROWS_BLOCK, WIDTH_BLOCK=_WIDTH_BLOCK, num_warps=8, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def merge_low_rank_fp8(base: Tensor, terms: Sequence[Term], weight: Tensor, scale: Tensor) -> None:
    """The sum of `merge_low_rank` as E4M3 to `weight` [N, K], with a fresh fp32 scale per row to `scale` [N, 1].

    All may be strided over rows. Scales and rounding are those of `fp8.merge_quantize` with the same fp32 sum.
    """
    rows, width = base.shape
    constants = _constants(terms)
    block, stages = _fp8_block(terms, constants["DEPTH"])
    with torch.cuda.device_of(base):
        _merge_low_rank_fp8_kernel[(-(-rows // _FP8_ROWS_BLOCK),)](
            base, weight, scale, *_arguments(terms), rows, width,
            base.stride(0), weight.stride(0), scale.stride(0), **constants,
            ROWS_BLOCK=_FP8_ROWS_BLOCK, WIDTH_BLOCK=block, STAGES=stages,
            num_warps=4, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip


def _arguments(terms: Sequence[Term]) -> tuple[tuple[Any, ...], ...]:
    """Of all terms: ups, downs, ranks, factors."""
    return (
        tuple(term.up for term in terms),
        tuple(term.down for term in terms),
        tuple(term.up.shape[1] for term in terms),
        tuple(term.factor for term in terms),
    )


def _constants(terms: Sequence[Term]) -> dict[str, Any]:
    """What kernels are compiled for: coarse, so that few ranks need a kernel of their own."""
    rank = max(term.up.shape[1] for term in terms)
    depth = 16 if rank <= 16 else _DEEPEST
    return {"COUNT": len(terms), "DEPTH": depth, "DEEP": rank > depth}


def _fp8_block(terms: Sequence[Term], depth: int) -> tuple[int, int]:
    """Columns of a tile and how many tiles are on their way: what registers and shared memory of 99 KB hold unspilled.

    One LoRA of rank 16 in bf16, the common case, takes 128 registers a thread with the first pair.
    """
    column_bytes = depth * sum(max(term.up.element_size(), term.down.element_size()) for term in terms)
    return (256, 3) if column_bytes <= 32 else (128, 2) if column_bytes <= 128 else (128, 1)
