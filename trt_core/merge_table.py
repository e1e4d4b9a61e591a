"""Merges of many weights as tables of numbers, so that one launch does them all: planned here, without a GPU.

A LoRA on all matrices of FLUX.1-dev is 494 of them. Launched one by one they keep Python busy for longer than the GPU:
35 ms for 16 ms on a fast host, twice that on a slow one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .low_rank import Term

_ALIGNMENT = 16
"""Bytes of an address, and elements of a stride, that kernels count on where they can."""
WHOLE_ROWS, WHOLE_WIDTH = 64, 256
"""What the rows and columns of every kernel's tile divide."""
FIELDS, TERM_FIELDS = 11, 4
"""Numbers of a merge, and of each of its terms after them: see `fields_of`."""
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


@dataclass(frozen=True, slots=True)
class Kind:
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


def kind_of(merge: Merge) -> Kind:
    """The kind of a merge whose terms share their dtypes (`alike`)."""
    base, out, terms = merge.base, merge.out, merge.terms
    ranks = [term.up.shape[1] for term in terms]
    largest = max(ranks, default=0)
    depth = _SHALLOW if largest <= _SHALLOW else _DEEPEST
    is_fp8 = isinstance(out, Fp8Place)
    return Kind(
        base.dtype,
        terms[0].up.dtype if terms else base.dtype,
        terms[0].down.dtype if terms else base.dtype,
        is_fp8,
        len(terms),
        depth,
        largest > depth,
        _is_whole(merge),
        all(rank % depth == 0 for rank in ranks) and all(term.up.data_ptr() % _ALIGNMENT == 0 for term in terms),
        is_fp8 and out.mean is not None,
    )


def alike(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The same terms with one dtype for all ups and one for all downs: fp32, which has every number of the others."""
    ups, downs = ({getattr(term, side).dtype for term in terms} for side in ("up", "down"))
    if len(ups) <= 1 and len(downs) <= 1:
        return tuple(terms)
    return tuple(Term(term.up.float(), term.down.float(), term.factor) for term in terms)


def fields_of(merge: Merge, first_program: int) -> list[int]:
    """A merge's row of the table: base, its row stride, out, its row stride, scale, its row stride, mean, correction,
    rows, width, the first program; then for each term up, down, rank and the bits of its fp32 factor."""
    start, out = merge.start, merge.out
    target, scale = (out.weight, out.scale) if isinstance(out, Fp8Place) else (out, None)
    mean, correction = (out.mean, out.correction) if isinstance(out, Fp8Place) else (None, None)
    fields = [
        _address(merge.base, start), merge.base.stride(0), _address(target, start), target.stride(0),
        *((0, 0) if scale is None else (_address(scale, start), scale.stride(0))),
        0 if mean is None else mean.data_ptr(), 0 if correction is None else _address(correction, start),
        merge.stop - start, merge.base.shape[1], first_program,
    ]  # fmt: skip
    for up, down, factor in merge.terms:
        fields += [up.data_ptr(), down.data_ptr(), up.shape[1], _FLOAT_BITS.unpack(_FLOAT.pack(factor))[0]]
    return fields


_FLOAT, _FLOAT_BITS = struct.Struct("f"), struct.Struct("i")


def _address(tensor: Tensor, row: int) -> int:
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()


def _is_whole(merge: Merge) -> bool:
    base, out = merge.base, merge.out
    if (merge.stop - merge.start) % WHOLE_ROWS or base.shape[1] % WHOLE_WIDTH:
        return False
    numbers = [term.down.data_ptr() for term in merge.terms]
    for matrix in (base, out.weight if isinstance(out, Fp8Place) else out):
        numbers += [matrix.stride(0), _address(matrix, merge.start)]
    return all(number % _ALIGNMENT == 0 for number in numbers)
