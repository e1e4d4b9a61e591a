"""Merges of many weights as tables of numbers, so that one launch does them all: planned here, without a GPU.

A LoRA on all matrices of FLUX.1-dev is 494 of them. Launched one by one they keep Python busy for longer than the GPU:
35 ms for 16 ms on a fast host, twice that on a slow one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from .low_rank import Term

_ALIGNMENT = 16
"""Bytes of an address, and elements of a stride, that kernels count on where they can."""
WHOLE_ROWS, WHOLE_WIDTH = 64, 256
"""What the rows and columns of every kernel's tile divide."""
FIELDS, TERM_FIELDS, FIRST_PROGRAM = 11, 4, 10
"""How many numbers a merge has, and each of its terms after them (`_fields`), and which one a launch fills in."""
_SHALLOW, _DEEPEST = 16, 32
"""Ranks that one step of a product takes at most: with 64, four LoRAs need more shared memory than there is."""


class Fp8Place(NamedTuple):
    """Where a quantized matrix goes: E4M3 [N, K], fp32 scales [N, 1], and with the mean input of the layer (fp32 [K])
    what rounding takes from the layer's mean output (fp32 [N])."""

    weight: Tensor
    scale: Tensor
    mean: Tensor | None = None
    correction: Tensor | None = None


class Merge(NamedTuple):
    """Rows `start` to `stop` of one weight: the base [N, K], where the sum goes, and what is added to these rows."""

    start: int
    stop: int
    base: Tensor
    out: Tensor | Fp8Place
    terms: tuple[Term, ...]


class Kind(NamedTuple):
    """What a kernel is compiled for; merges of one kind share a launch. Coarse, so that few ranks need another."""

    base: torch.dtype
    up: torch.dtype
    down: torch.dtype
    fp8: bool
    count: int
    depth: int
    deep: bool
    whole: bool
    """Tiles have no edges, and addresses are aligned: all matrices of FLUX, whole or cut where LoRAs begin."""
    whole_ranks: bool
    """Ranks are multiples of `depth`."""
    with_mean: bool


class Planned(NamedTuple):
    """One merge for a launch: its kind, its row of the table but for the first program, rows and width."""

    kind: Kind
    fields: list[int]
    rows: int
    width: int


def planned(merge: Merge) -> Planned:
    """A merge whose terms share their dtypes (`alike`). Quick, as a LoRA has 494 of them, and a GPU waits meanwhile."""
    base, out, terms = merge.base, merge.out, merge.terms
    rows, width, is_fp8 = merge.stop - merge.start, base.shape[1], isinstance(out, Fp8Place)
    fields, addresses = _fields(merge, rows, width), [term.up.data_ptr() for term in terms]
    ranks = [term.up.shape[1] for term in terms]
    largest = max(ranks, default=0)
    depth = _SHALLOW if largest <= _SHALLOW else _DEEPEST
    downs = fields[FIELDS + 1 :: TERM_FIELDS]
    kind = Kind(
        base.dtype,
        terms[0].up.dtype if terms else base.dtype,
        terms[0].down.dtype if terms else base.dtype,
        is_fp8,
        len(terms),
        depth,
        largest > depth,
        not (rows % WHOLE_ROWS or width % WHOLE_WIDTH) and _are_multiples([*fields[:4], *downs], _ALIGNMENT),
        _are_multiples(ranks, depth) and _are_multiples(addresses, _ALIGNMENT),
        is_fp8 and out.mean is not None,
    )
    return Planned(kind, fields, rows, width)


def alike(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The same terms with one dtype for all ups and one for all downs: fp32, which has every number of the others."""
    if len(terms) <= 1:
        return tuple(terms)
    ups, downs = ({getattr(term, side).dtype for term in terms} for side in ("up", "down"))
    if len(ups) == len(downs) == 1:
        return tuple(terms)
    return tuple(Term(term.up.float(), term.down.float(), term.factor) for term in terms)


def _fields(merge: Merge, rows: int, width: int) -> list[int]:
    """A merge's row of the table: base, its row stride, out, its row stride, scale, its row stride, mean, correction,
    rows, width, the first program; then for each term up, down, rank and the bits of its fp32 factor."""
    start, out = merge.start, merge.out
    if isinstance(out, Fp8Place):
        mean = 0 if out.mean is None else out.mean.data_ptr()
        correction = 0 if out.correction is None else out.correction.data_ptr() + 4 * start
        places = (*_place(out.weight, start), *_place(out.scale, start), mean, correction)
    else:
        places = (*_place(out, start), 0, 0, 0, 0)
    fields = [*_place(merge.base, start), *places, rows, width, 0]
    for up, down, factor in merge.terms:
        fields += (up.data_ptr(), down.data_ptr(), up.shape[1], _FLOAT_BITS.unpack(_FLOAT.pack(factor))[0])
    return fields


_FLOAT, _FLOAT_BITS = struct.Struct("f"), struct.Struct("i")


def _place(matrix: Tensor, row: int) -> tuple[int, int]:
    stride = matrix.stride(0)
    return matrix.data_ptr() + row * stride * matrix.element_size(), stride


def _are_multiples(numbers: Sequence[int], of: int) -> bool:
    """Of a power of two."""
    return not reduce(or_, numbers, 0) & (of - 1)
