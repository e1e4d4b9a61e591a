"""Triton kernels of `modulation_table`: find this step's vec among those that are known, and multiply where it is not.

A GPU decides, not Python: whether a row is known depends on what only the GPU has read, and asking would make Python
wait for it. All matrices are one launch; a program that finds everything known copies its few numbers and ends.
"""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .storage import GROUP

ROWS = 32
"""Rows of one product, known ahead or not. Always as many, whatever they hold: so each row's sums are made in the same
order, and a number from the table has the bits that computing it again would have."""
BLOCK_ROWS = 64
"""Rows of a matrix in one program. With 32, all programs together would read the 32 inputs as often as the weights."""
_RANK_BLOCK = 16
FIELDS = 10
"""Numbers that describe a layer: see `Layers`."""


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """Matrices of one dtype that one launch multiplies with.

    `fields` [layers, FIELDS], int64: weight, its row stride, scale, its row stride, bias, up, its row stride, rank,
    first rank, rows. `blocks` [programs, 3], int32: layer, first row, first place among all outputs. `scales`: 0 none,
    1 one per row or matrix, 2 one per group of columns. Whoever gives addresses keeps what they point to.
    """

    fields: Tensor
    blocks: Tensor
    dtype: torch.dtype
    scales: int
    has_low_rank: bool


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What one step's rows are in the table: `missing` [1] is 0 where every picture's row is known, `index` [B] says
    where, and `slots` [ROWS] where new rows go, -1 for nowhere."""

    missing: Tensor
    index: Tensor
    slots: Tensor


@triton.jit
def _following_kernel(
    timesteps_ptr, expected_ptr, out_ptr, BATCH: tl.constexpr, EXPECTED: tl.constexpr, ROWS: tl.constexpr
):
    """This step's timesteps, then those that `expected` has after the first of them, each once per picture."""
    place = tl.arange(0, EXPECTED)
    now = tl.load(timesteps_ptr)
    at = tl.min(tl.where(tl.load(expected_ptr + place) == now, place, EXPECTED), axis=0)
    row = tl.arange(0, ROWS)
    following = at + row // BATCH
    own = tl.load(timesteps_ptr + row, mask=row < BATCH, other=0.0)
    later = tl.load(expected_ptr + following, mask=(row >= BATCH) & (following < EXPECTED), other=float("nan"))
    tl.store(out_ptr + row, tl.where(row < BATCH, own, later))


@triton.jit
def _compare_kernel(vec_ptr, keys_ptr, same_ptr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program is one picture and one slot: whether their rows are equal. NaN, an empty slot, equals nothing."""
    item, slot = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    vec = tl.load(vec_ptr + item * WIDTH + column, mask=inside, other=0.0)
    key = tl.load(keys_ptr + slot * WIDTH + column, mask=inside, other=0.0)
    tl.store(same_ptr + item * SLOTS + slot, tl.min((vec == key).to(tl.int32), axis=0))


@triton.jit
def _choose_kernel(
    same_ptr, times_ptr, head_ptr, missing_ptr, index_ptr, slots_ptr, BATCH: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, HAS_TIMES: tl.constexpr,
):  # fmt: skip
    """Where each picture's row is; where one is nowhere, the slots that all rows go to, the oldest ones."""
    slot, row = tl.arange(0, SLOTS), tl.arange(0, ROWS)
    missing = 0
    for item in tl.static_range(BATCH):
        at = tl.max(tl.where(tl.load(same_ptr + item * SLOTS + slot) != 0, slot, -1), axis=0)
        tl.store(index_ptr + item, at)
        missing = missing | (at < 0).to(tl.int32)
    there = row < BATCH
    if HAS_TIMES:
        times = tl.load(times_ptr + row)
        there = there | (times == times)
    head = tl.load(head_ptr)
    number = tl.cumsum(there.to(tl.int32), axis=0)
    tl.store(slots_ptr + row, tl.where(there & (missing != 0), (head + number - 1) % SLOTS, -1))
    tl.store(head_ptr, (head + missing * tl.sum(there.to(tl.int32), axis=0)) % SLOTS)
    tl.store(missing_ptr, missing)


@triton.jit
def _product(
    x_ptr, field_ptr, row, inside, WEIGHT: tl.constexpr, SCALES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, BLOCK_ROWS] in fp32 of all inputs with rows of the matrix. SCALES: see `Layers`.

    The 32 inputs come first: with 64 rows of the matrix there, Hopper's own instruction would be taken, for which
    Triton 3.6 cannot widen eight bits on the way.
    """
    stride = tl.load(field_ptr + 1)
    scale_ptr = tl.load(field_ptr + 2).to(tl.pointer_type(tl.float32))
    scale_stride = tl.load(field_ptr + 3)
    column, item = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    weights = tl.load(field_ptr).to(tl.pointer_type(WEIGHT)) + row.to(tl.int64)[None, :] * stride + column[:, None]
    inputs = x_ptr + item[:, None] * WIDTH + column[None, :]
    total = tl.zeros((ROWS, BLOCK_ROWS), dtype=tl.float32)
    for start in tl.range(0, WIDTH, BLOCK):
        # Addresses that were read from memory: what is known of them is said here, or elements are read one by one.
        places = tl.multiple_of(weights + start, (16, 1))
        present = start + column < WIDTH
        weight = tl.load(places, mask=present[:, None] & inside[None, :], other=0.0).to(x_ptr.dtype.element_ty)
        x = tl.load(inputs + start, mask=present[None, :], other=0.0)
        if SCALES == 2:
            scale = tl.load(scale_ptr + row.to(tl.int64) * scale_stride + start // BLOCK, mask=inside, other=0.0)
            total += tl.dot(x, weight) * scale[None, :]
        else:
            total = tl.dot(x, weight, total)
    if SCALES == 1:
        total = total * tl.load(scale_ptr + row.to(tl.int64) * scale_stride, mask=inside, other=0.0)[None, :]
    return total


@triton.jit
def _low_rank(
    projected_ptr, ranks, field_ptr, row, inside, UP: tl.constexpr, ROWS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """What LoRAs add to the sums. In blocks of one size: a sum does not depend on how many ranks other LoRAs have."""
    up_ptr = tl.load(field_ptr + 5).to(tl.pointer_type(UP))
    stride, rank, first = tl.load(field_ptr + 6), tl.load(field_ptr + 7), tl.load(field_ptr + 8)
    item = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, rank, RANK_BLOCK):
        place = start + tl.arange(0, RANK_BLOCK)
        known = place < rank
        ups = up_ptr + row.to(tl.int64)[None, :] * stride + place[:, None]
        up = tl.load(ups, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
        beside = tl.load(projected_ptr + item[:, None] * ranks + first + place[None, :], mask=known[None, :], other=0.0)
        total = tl.dot(beside, up, total, input_precision="tf32x3")
    return total


@triton.jit
def _store_new(
    total, slots_ptr, table_ptr, outputs, place, inside, places, BATCH: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of all rows to their slots, and of the first BATCH to the step's own places as well."""
    values = total.to(table_ptr.dtype.element_ty)
    row = tl.arange(0, ROWS)
    slot = tl.load(slots_ptr + row)
    cells = table_ptr + slot.to(tl.int64)[:, None] * places + place[None, :]
    tl.store(cells, values, mask=(slot >= 0)[:, None] & inside[None, :])
    tl.store(outputs[None, :] + row[:, None] * WIDTH, values, mask=(row < BATCH)[:, None] & inside[None, :])


@triton.jit
def _copy_known(
    index_ptr, table_ptr, outputs, place, inside, places, BATCH: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr
):
    item = tl.arange(0, ITEMS)
    wanted = (item < BATCH)[:, None] & inside[None, :]
    slot = tl.load(index_ptr + item, mask=item < BATCH, other=0)
    values = tl.load(table_ptr + slot.to(tl.int64)[:, None] * places + place[None, :], mask=wanted)
    tl.store(outputs[None, :] + item[:, None] * WIDTH, values, mask=wanted)


@triton.jit
def _modulations_kernel(
    x_ptr, projected_ptr, ranks, fields_ptr, blocks_ptr, missing_ptr, index_ptr, slots_ptr, table_ptr, out_ptr,
    places, WEIGHT: tl.constexpr, UP: tl.constexpr, SCALES: tl.constexpr, HAS_LOW_RANK: tl.constexpr,
    BATCH: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, RANK_BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One program is BLOCK_ROWS outputs of one layer: from the table, or computed for all rows and put there, too."""
    program = tl.program_id(0)
    field_ptr = fields_ptr + tl.load(blocks_ptr + program * 3) * FIELDS
    row = tl.load(blocks_ptr + program * 3 + 1) + tl.arange(0, BLOCK_ROWS)
    inside = row < tl.load(field_ptr + 9)
    place = tl.load(blocks_ptr + program * 3 + 2) + tl.arange(0, BLOCK_ROWS)
    # Chunks of WIDTH outputs, shifts, scales, gates, are apart: [chunk, picture, WIDTH].
    outputs = out_ptr + (place // WIDTH) * (BATCH * WIDTH) + place % WIDTH
    if tl.load(missing_ptr) != 0:
        total = _product(x_ptr, field_ptr, row, inside, WEIGHT, SCALES, WIDTH, BLOCK, ROWS, BLOCK_ROWS)
        if HAS_LOW_RANK:
            total += _low_rank(projected_ptr, ranks, field_ptr, row, inside, UP, ROWS, RANK_BLOCK, BLOCK_ROWS)
        bias_ptr = tl.load(field_ptr + 4).to(tl.pointer_type(UP))
        total += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)[None, :]
        _store_new(total, slots_ptr, table_ptr, outputs, place, inside, places, BATCH, WIDTH, ROWS)
    else:
        _copy_known(index_ptr, table_ptr, outputs, place, inside, places, BATCH, ITEMS, WIDTH)


@triton.jit
def _remember_kernel(vec_ptr, slots_ptr, keys_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Makes a row's slot known. After the products: nobody finds a slot whose numbers are not there yet."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    column = tl.arange(0, BLOCK)
    if slot >= 0:
        vec = tl.load(vec_ptr + row * WIDTH + column, mask=column < WIDTH)
        tl.store(keys_ptr + slot * WIDTH + column, vec, mask=column < WIDTH)


def following(timesteps: Tensor, expected: Tensor) -> Tensor:
    """[ROWS]: `timesteps` [B], then what `expected` (a power of two of them) has after the first, NaN at its end."""
    out = torch.empty(ROWS, dtype=timesteps.dtype, device=timesteps.device)
    with torch.cuda.device_of(out):
        _following_kernel[(1,)](timesteps, expected, out, timesteps.shape[0], expected.shape[0], ROWS)
    return out


def find(vec: Tensor, batch: int, times: Tensor | None, keys: Tensor, head: Tensor) -> Found:
    """Where the first `batch` rows of vec [ROWS, K] are among `keys` [slots, K]; `head` [1], int32, moves on where new
    rows are to be put. `times` [ROWS]: NaN for rows that hold nothing; None: only the first `batch` hold something."""
    slots, width = keys.shape
    numbers = torch.empty(1 + batch + ROWS + batch * slots, dtype=torch.int32, device=vec.device)
    found = Found(numbers[:1], numbers[1 : 1 + batch], numbers[1 + batch : 1 + batch + ROWS])
    same = numbers[1 + batch + ROWS :]
    with torch.cuda.device_of(vec):
        _compare_kernel[(batch, slots)](vec, keys, same, slots, width, triton.next_power_of_2(width))
        _choose_kernel[(1,)](
            same, vec if times is None else times, head, found.missing, found.index, found.slots,
            BATCH=batch, SLOTS=slots, ROWS=ROWS, HAS_TIMES=times is not None, num_warps=1,
        )  # fmt: skip
    return found


def modulate(x: Tensor, projected: Tensor | None, layers: Layers, found: Found, table: Tensor, out: Tensor) -> None:
    """Writes this step's products to `out` [places / K, B, K], and new rows' to `table` [slots, places].

    x [ROWS, K]: silu(vec); `projected` [ROWS, ranks] in fp32: x times what LoRAs have as `down`.
    """
    width, batch, beside = x.shape[1], out.shape[1], x if projected is None else projected
    with torch.cuda.device_of(x):
        _modulations_kernel[(layers.blocks.shape[0],)](
            x, beside, beside.shape[1], layers.fields, layers.blocks, found.missing, found.index, found.slots,
            table, out, table.shape[1],
            WEIGHT=_TYPES[layers.dtype], UP=_TYPES[x.dtype], SCALES=layers.scales, HAS_LOW_RANK=layers.has_low_rank,
            BATCH=batch, ITEMS=triton.next_power_of_2(batch), WIDTH=width, BLOCK=GROUP, ROWS=ROWS,
            BLOCK_ROWS=BLOCK_ROWS, RANK_BLOCK=_RANK_BLOCK, FIELDS=FIELDS, num_warps=4, num_stages=4,
        )  # fmt: skip


def remember(vec: Tensor, found: Found, keys: Tensor) -> None:
    """Writes new rows of vec [ROWS, K] to their slots of `keys`."""
    width = vec.shape[1]
    with torch.cuda.device_of(vec):
        _remember_kernel[(ROWS,)](vec, found.slots, keys, width, triton.next_power_of_2(width))


_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}
