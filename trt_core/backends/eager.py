"""PyTorch as it is: always available, and the reference for the others."""

from __future__ import annotations

from torch import Tensor

from ..config import Backend
from .base import Request


class EagerSegment:
    """The segment's own function."""

    backend = Backend.EAGER
    plan_bytes = 0

    def __init__(self, request: Request) -> None:
        self._function = request.segment.function

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._function(*tensors)

    def close(self) -> None:
        return None
