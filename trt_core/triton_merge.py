"""Triton kernels that merge low-rank products into weights without writing the product to memory.

PyTorch needs three passes for it: a product in fp32, its factor, and a sum of bf16 and fp32. For a LoRA on all 304
matrices of FLUX on an H100 they took 78 ms, where reading the base and writing the result takes 16 ms.
`low_rank_merge` chooses between these kernels and PyTorch.
"""
# ruff: noqa: N803, RUF005 - Triton writes compile-time constants in capitals, and knows no starred expressions.

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from .flux.triton_rows import clamped, scale_from_bits
from .low_rank import Term
from .merge_table import FIELDS, FIRST_PROGRAM, TERM_FIELDS, Kind, Merge, Planned, planned

_ROWS_BLOCK, _WIDTH_BLOCK = 64, 128
"""With 8 warps 64 registers a thread for one LoRA, so 4 programs on a multiprocessor, with 64 KB of the base on their
way; 128 rows would take 154 registers and leave one program."""
_FP8_ROWS_BLOCK = 16
"""The fewest that tensor cores take: 3072 rows are 192 programs for the 132 multiprocessors of an H100, and what the
second pass over these rows reads again is still in its L2 cache."""


@triton.jit
def _read(places, row_inside, column_inside, WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):
    """A tile, zero where it has no rows or columns. Masks that are not needed take registers, and so whole programs."""
    if WHOLE_ROWS and WHOLE_COLUMNS:
        return tl.load(places)
    elif WHOLE_ROWS:
        return tl.load(places, mask=column_inside[None, :], other=0.0)
    elif WHOLE_COLUMNS:
        return tl.load(places, mask=row_inside[:, None], other=0.0)
    else:
        return tl.load(places, mask=row_inside[:, None] & column_inside[None, :], other=0.0)


@triton.jit
def _write(places, values, row_inside, column_inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(places, values)
    else:
        tl.store(places, values, mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def _product(
    up_ptr, down_ptr, rank, row, column, rows, width, DEPTH: tl.constexpr, DEEP: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_RANKS: tl.constexpr,
):  # fmt: skip
    """A tile of up @ down in fp32. Factors of 16 bits have exact products; of fp32 ones, three tf32 products keep 21
    bits and more, where one would keep 10."""
    depth = tl.arange(0, DEPTH)
    ups = up_ptr + row.to(tl.int64)[:, None] * rank + depth[None, :]
    downs = down_ptr + depth[:, None] * width + column[None, :]
    up = _read(ups, row < rows, depth < rank, WHOLE, WHOLE_RANKS)
    down = _read(downs, depth < rank, column < width, WHOLE_RANKS, WHOLE)
    total = _dot(up, down)
    if DEEP:
        for start in range(DEPTH, rank, DEPTH):
            left = depth < rank - start
            up = _read(ups + start, row < rows, left, WHOLE, WHOLE_RANKS)
            down = _read(downs + start * width, left, column < width, WHOLE_RANKS, WHOLE)
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
    base_ptr, base_stride, terms, row, column, rows, width, COUNT: tl.constexpr, DEPTH: tl.constexpr,
    DEEP: tl.constexpr, WHOLE: tl.constexpr, WHOLE_RANKS: tl.constexpr,
):  # fmt: skip
    """A tile of base + sum of factor * (up @ down) in fp32, in the order of the terms."""
    places = base_ptr + row.to(tl.int64)[:, None] * base_stride + column[None, :]
    x = _read(places, row < rows, column < width, WHOLE, WHOLE).to(tl.float32)
    ups, downs, ranks, factors = terms
    for index in tl.static_range(COUNT):
        product = _product(
            ups[index], downs[index], ranks[index], row, column, rows, width, DEPTH, DEEP, WHOLE, WHOLE_RANKS
        )  # fmt: skip
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
def _merge_of(fields_ptr, owners_ptr, FIELDS: tl.constexpr, WHOLE: tl.constexpr):
    """Of this program: its merge's fields, the merge's rows and width, and which of its programs this one is."""
    program = tl.program_id(0)
    field_ptr = fields_ptr + tl.load(owners_ptr + program).to(tl.int64) * FIELDS
    width = tl.load(field_ptr + 9).to(tl.int32)
    if WHOLE:
        width = tl.multiple_of(width, 16)
    return field_ptr, tl.load(field_ptr + 8).to(tl.int32), width, program - tl.load(field_ptr + 10).to(tl.int32)


@triton.jit
def _matrix(field_ptr, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """An address and a row stride. They were read from memory: what is known of them is said here, or elements would be
    read one by one."""
    address, stride = tl.load(field_ptr).to(tl.pointer_type(DTYPE)), tl.load(field_ptr + 1)
    if WHOLE:
        address, stride = tl.multiple_of(address, 16), tl.multiple_of(stride, 16)
    return address, stride


@triton.jit
def _terms(
    field_ptr, UP: tl.constexpr, DOWN: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_RANKS: tl.constexpr, TERM_FIELDS: tl.constexpr,
):  # fmt: skip
    """Tuples of all terms: ups, downs, ranks, factors."""
    ups, downs, ranks, factors = (), (), (), ()
    for index in tl.static_range(COUNT):
        place = field_ptr + index * TERM_FIELDS
        up = tl.load(place).to(tl.pointer_type(UP))
        down = tl.load(place + 1).to(tl.pointer_type(DOWN))
        rank = tl.load(place + 2).to(tl.int32)
        if WHOLE:
            down = tl.multiple_of(down, 16)
        if WHOLE_RANKS:
            up, rank = tl.multiple_of(up, 16), tl.multiple_of(rank, 16)
        ups, downs, ranks = ups + (up,), downs + (down,), ranks + (rank,)
        factors = factors + (tl.load(place + 3).to(tl.int32).to(tl.float32, bitcast=True),)
    return ups, downs, ranks, factors


@triton.jit
def _merge_low_rank_kernel(
    fields_ptr, owners_ptr, BASE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    COUNT: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, WHOLE: tl.constexpr, WHOLE_RANKS: tl.constexpr,
    FIELDS: tl.constexpr, TERM_FIELDS: tl.constexpr, ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program is one tile of one merge."""
    field_ptr, rows, width, tile = _merge_of(fields_ptr, owners_ptr, FIELDS + COUNT * TERM_FIELDS, WHOLE)
    base_ptr, base_stride = _matrix(field_ptr, BASE, WHOLE)
    out_ptr, out_stride = _matrix(field_ptr + 2, BASE, WHOLE)
    terms = _terms(field_ptr + FIELDS, UP, DOWN, COUNT, WHOLE, WHOLE_RANKS, TERM_FIELDS)
    beside = tl.cdiv(width, WIDTH_BLOCK)
    row = (tile // beside) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    column = (tile % beside) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    x = _merged(
        base_ptr, base_stride, terms, row, column, rows, width, COUNT, DEPTH, DEEP, WHOLE, WHOLE_RANKS
    )  # fmt: skip
    places = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    _write(places, x.to(BASE), row < rows, column < width, WHOLE)


@triton.jit
def _merge_low_rank_fp8_kernel(
    fields_ptr, owners_ptr, BASE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    COUNT: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, WHOLE: tl.constexpr, WHOLE_RANKS: tl.constexpr,
    WITH_MEAN: tl.constexpr, FIELDS: tl.constexpr, TERM_FIELDS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program is ROWS_BLOCK whole rows: their largest numbers, then the same sums again, divided by the scales."""
    field_ptr, rows, width, tile = _merge_of(fields_ptr, owners_ptr, FIELDS + COUNT * TERM_FIELDS, WHOLE)
    base_ptr, base_stride = _matrix(field_ptr, BASE, WHOLE)
    weight_ptr, weight_stride = _matrix(field_ptr + 2, tl.float8e4nv, WHOLE)
    scale_ptr, scale_stride = _matrix(field_ptr + 4, tl.float32, False)
    mean_ptr = tl.load(field_ptr + 6).to(tl.pointer_type(tl.float32))
    terms = _terms(field_ptr + FIELDS, UP, DOWN, COUNT, WHOLE, WHOLE_RANKS, TERM_FIELDS)
    row = tile * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    largest = tl.zeros((ROWS_BLOCK, WIDTH_BLOCK), dtype=tl.int32)
    for start in tl.range(0, width, WIDTH_BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, WIDTH_BLOCK)
        x = _merged(
            base_ptr, base_stride, terms, row, column, rows, width, COUNT, DEPTH, DEEP, WHOLE, WHOLE_RANKS
        )  # fmt: skip
        # As `triton_rows.amax_bits`. Columns that are not there are 0, or NaN where `up` makes NaN of the whole row.
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = scale_from_bits(tl.max(largest, axis=1))
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row * scale_stride, scale, mask=row < rows)
    lost = tl.zeros((ROWS_BLOCK, WIDTH_BLOCK), dtype=tl.float32)
    for start in tl.range(0, width, WIDTH_BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, WIDTH_BLOCK)
        x = _merged(
            base_ptr, base_stride, terms, row, column, rows, width, COUNT, DEPTH, DEEP, WHOLE, WHOLE_RANKS
        )  # fmt: skip
        q = clamped(_quotient(x, scale[:, None], inverse[:, None])).to(tl.float8e4nv)
        places = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
        _write(places, q, row < rows, column < width, WHOLE)
        if WITH_MEAN:
            mean = tl.load(mean_ptr + column, mask=column < width, other=0.0)
            lost += (x - q.to(tl.float32) * scale[:, None]) * mean[None, :]
    if WITH_MEAN:
        correction_ptr = tl.load(field_ptr + 7).to(tl.pointer_type(tl.float32))
        tl.store(correction_ptr + row, tl.sum(lost, axis=1), mask=row < rows)


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
        there = Term(term.up.to(device), term.down.to(device), term.factor)
        merge_all([Merge(0, len(base), there.down, out, (there,))])
        seen = out.cpu()
    except torch.OutOfMemoryError:
        raise
    except (TritonError, subprocess.CalledProcessError, OSError, RuntimeError, TypeError) as error:
        return f"it does not compile here ({error})."
    expected = base.float() + 2 * (term.up.float() @ base.float())
    return None if torch.equal(seen.float(), expected.bfloat16().float()) else "its sums are wrong on this GPU."


def merge_all(merges: Iterable[Merge]) -> None:
    """Writes base + sum of factor * (up @ down), summed in fp32 in this order, in as few launches as there are kinds.

    base and out [N, K] may be strided over rows and may be the same tensor; all ups [N, r] of a merge have one dtype,
    and all downs [r, K] (`alike`). The sum is rounded once to out's dtype, or to E4M3 with a fresh fp32 scale per row,
    as `fp8.merge_quantize` rounds it; with a mean (`Fp8Place`) what that takes from the layer's mean output,
    (sum - its E4M3) @ mean, goes to the correction. The same inputs give the same bits, whatever is beside them.
    """
    merges = list(merges)
    kinds: dict[Kind, list[Planned]] = {}
    for item in map(planned, merges):
        kinds.setdefault(item.kind, []).append(item)
    for kind, items in kinds.items():
        _launch(kind, items, merges[0].base.device)


def _launch(kind: Kind, items: Sequence[Planned], device: torch.device) -> None:
    counts = [_programs(item) for item in items]
    for item, first in zip(items, itertools.accumulate(counts, initial=0), strict=False):
        item.fields[FIRST_PROGRAM] = first
    table = torch.tensor([item.fields for item in items], dtype=torch.int64).to(device, non_blocking=True)
    repeats = torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True)
    owners = torch.repeat_interleave(repeats, output_size=sum(counts))
    kernel = _merge_low_rank_fp8_kernel if kind.fp8 else _merge_low_rank_kernel
    with torch.cuda.device_of(owners):
        kernel[(owners.shape[0],)](table, owners, **_constants(kind))


def _programs(item: Planned) -> int:
    if item.kind.fp8:
        return -(-item.rows // _FP8_ROWS_BLOCK)
    return -(-item.rows // _ROWS_BLOCK) * -(-item.width // _WIDTH_BLOCK)


def _constants(kind: Kind) -> dict[str, Any]:
    """What the kernel of a kind is compiled with."""
    constants = {
        "BASE": _TYPES[kind.base], "UP": _TYPES[kind.up], "DOWN": _TYPES[kind.down],
        "COUNT": kind.count, "DEPTH": kind.depth, "DEEP": kind.deep,
        "WHOLE": kind.whole, "WHOLE_RANKS": kind.whole_ranks,
        "FIELDS": FIELDS, "TERM_FIELDS": TERM_FIELDS, "enable_fp_fusion": False,
    }  # fmt: skip
    if not kind.fp8:
        return {**constants, "ROWS_BLOCK": _ROWS_BLOCK, "WIDTH_BLOCK": _WIDTH_BLOCK, "num_warps": 8, "num_stages": 1}
    block, stages = _fp8_block(kind)
    return {
        **constants, "WITH_MEAN": kind.with_mean, "ROWS_BLOCK": _FP8_ROWS_BLOCK, "WIDTH_BLOCK": block, "STAGES": stages,
        "num_warps": 4, "num_stages": stages,
    }  # fmt: skip


def _fp8_block(kind: Kind) -> tuple[int, int]:
    """Columns of a tile and how many tiles are on their way: what registers and shared memory of 99 KB hold unspilled.

    One LoRA of rank 16 in bf16, the common case, takes 128 registers a thread with the first pair.
    """
    column_bytes = kind.count * kind.depth * max(kind.up.itemsize, kind.down.itemsize)
    return (256, 3) if column_bytes <= 32 else (128, 2) if column_bytes <= 128 else (128, 1)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
