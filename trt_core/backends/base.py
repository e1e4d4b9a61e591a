"""What every backend offers: compile a segment into a callable of the same signature, or say why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import Backend, Profile
from ..flux.catalogue import Segment
from ..flux.precision import PLAIN, Precision


class CompiledSegment(Protocol):
    """A segment ready to run: `(*activations, *weights)` to a tuple of tensors on the same device."""

    backend: Backend
    plan_bytes: int
    """Size of what was built, as kept in the engine cache; 0 where nothing of ours is stored."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...

    def close(self) -> None:
        """Gives back what the segment holds; it must not be called afterwards."""


@dataclass(frozen=True, slots=True)
class Request:
    """One segment to compile, and for what."""

    segment: Segment
    dtype: torch.dtype
    device: torch.device
    profile: Profile
    reference: Callable[..., tuple[Tensor, ...]]
    """The same function with PyTorch's general attention, which also runs in fp32."""
    precision: Precision = PLAIN
    weights: Sequence[Tensor] = ()
    """Bound weights to check and measure with; without them random ones are made, which takes memory."""
