"""Whole blocks leave their last sums open; beside the streams, what is left to add looks less exact than it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from trt_core.backends.base import Request
from trt_core.plan import WHOLE_SEGMENT

GATE = 0.3
"""The size of gates in `Segment.random_inputs`."""


def added(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x and add of each stream, with one gate for all."""
    return tuple(x + GATE * add for x, add in zip(outputs[::2], outputs[1::2], strict=True))


def with_sums(asked: Request) -> Request:
    """The same for what a whole block's sums come to; other segments as they are."""
    if asked.segment.name not in WHOLE_SEGMENT.values():
        return asked

    def of(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *inputs: added(function(*inputs))

    return replace(
        asked, segment=replace(asked.segment, function=of(asked.segment.function)), reference=of(asked.reference)
    )
