"""The timesteps that a diffusers pipeline is about to run through, read from its scheduler."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

_PER_UNIT = 1000
"""FluxPipeline divides the scheduler's timesteps by it, after rounding them to the latents' dtype."""


class Schedule:
    """What the scheduler of one pipeline holds. A bare transformer has none, and nothing is known then.

    The pipeline itself is not kept alive by this; its scheduler is, which pipelines made from it share.
    """

    def __init__(self, pipe_or_transformer: Any = None) -> None:
        has_scheduler = hasattr(pipe_or_transformer, "scheduler")
        self._pipe = weakref.ref(pipe_or_transformer) if has_scheduler else None
        self._scheduler: Any = None
        self._seen: Tensor | None = None

    def is_new(self) -> bool:
        """Whether another schedule began since this was asked last; True at each call where there is none.

        A pipeline sets new timesteps for each call of its own. The tensor is compared by identity, and kept, so that no
        other one can take its place.
        """
        before, self._seen = self._seen, self._now()
        return self._seen is None or self._seen is not before

    def timesteps(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Those of `is_new`, as the pipeline hands them to its transformer; None where nobody knows them."""
        if self._seen is None:
            return None
        return self._seen.to(device).to(dtype) / _PER_UNIT

    def _now(self) -> Tensor | None:
        pipe = None if self._pipe is None else self._pipe()
        if pipe is not None:
            self._scheduler = pipe.scheduler
        found = getattr(self._scheduler, "timesteps", None)
        return found if isinstance(found, Tensor) else None
