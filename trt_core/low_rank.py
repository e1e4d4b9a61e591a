"""Which low-rank products are added to which rows of a weight, where LoRAs do nothing else to it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .lora.changes import LowRank, Patch

DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))
_PLAIN = (Tensor, nn.Parameter)


class Term(NamedTuple):
    """`factor * (up @ down)`: contiguous `up` [rows, r] and `down` [r, width], of `DTYPES`."""

    up: Tensor
    down: Tensor
    factor: float


class Section(NamedTuple):
    """Rows `start` to `stop` of a weight, and the terms to add to them, in the order of the patches."""

    start: int
    stop: int
    terms: tuple[Term, ...]


class Span(NamedTuple):
    """One patch: its `term`, and the rows of the weight that it is added to."""

    start: int
    stop: int
    term: Term


def low_rank_sections(
    shape: Sequence[int], patches: Sequence[tuple[Patch, float]], device: torch.device
) -> list[Section] | None:
    """All rows of a weight of `shape` in order, cut where a patch begins or ends; factors on `device` in their dtypes.

    None where `low_rank_spans` is None. Copies of factors are on their way, in the order of the current stream.
    """
    if (found := low_rank_spans(shape, patches)) is None:
        return None
    spans = [Span(start, stop, _on(device, term)) for start, stop, term in found]
    edges = sorted({0, shape[0], *(edge for span in spans for edge in span[:2])})
    return [Section(start, stop, _terms(spans, start, stop)) for start, stop in itertools.pairwise(edges)]


def low_rank_spans(shape: Sequence[int], patches: Sequence[tuple[Patch, float]]) -> list[Span] | None:
    """What patches add to a weight of `shape`; factors wherever they are.

    None where a patch is anything but a low-rank product that fits the weight. What has strength or scale 0 is no span.
    """
    if len(shape) != 2:
        return None
    spans = []
    for patch, strength in patches:
        change, (start, stop) = patch.change, patch.rows or (0, shape[0])
        if strength == 0:
            continue
        if (
            type(change) is not LowRank
            or not 0 <= start < stop <= shape[0]
            or not _fits(change, stop - start, shape[1])
        ):
            return None
        if change.scale != 0:
            spans.append(Span(start, stop, Term(change.up, change.down, float(strength * change.scale))))
    return spans


def _on(device: torch.device, term: Term) -> Term:
    up, down, factor = term
    if up.device == device == down.device and up.is_contiguous() and down.is_contiguous():
        return term  # the usual case, in a third of the time
    return Term(*(side.to(device, non_blocking=True).contiguous() for side in (up, down)), factor)


def _fits(change: LowRank, rows: int, width: int) -> bool:
    """Whether a kernel can read the factors. Where their shapes are wrong, other code raises the error."""
    up, down = change.up, change.down
    known = up.dtype in DTYPES and down.dtype in DTYPES and type(up) in _PLAIN and type(down) in _PLAIN
    rank = down.shape[0]
    return known and rank > 0 and up.shape == (rows, rank) and down.shape == (rank, width)


def _terms(spans: Sequence[Span], start: int, stop: int) -> tuple[Term, ...]:
    """Of those spans that cover these rows: their terms, and of each `up` these rows alone."""
    return tuple(
        term if stop - start == last - first else term._replace(up=term.up[start - first : stop - first])
        for first, last, term in spans
        if first <= start and stop <= last
    )
