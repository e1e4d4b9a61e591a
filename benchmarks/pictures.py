"""What a step costs where it is one of a picture's: other timesteps at each step, another text for each picture.

Modulations may be computed once for a picture's steps, so a step that is repeated would leave out what a picture pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trt_core.measure import median_milliseconds

from .fp8_calls import call

STEPS = 20
_PICTURES = 3


@dataclass(eq=False)
class Pipeline:
    """What of a diffusers pipeline a step needs. The whole one would bring the code of its text encoders into memory,
    which is measured, too."""

    transformer: Any
    scheduler: Any


def pipeline(model: Any) -> Pipeline:
    """The transformer with diffusers' scheduler for it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return Pipeline(model, FlowMatchEulerDiscreteScheduler())


class Pictures:
    """One picture after the other: the pipeline's loop over `steps`, without what is around the transformer."""

    def __init__(self, pipe: Pipeline, transformer: Any, arguments: dict[str, Tensor], steps: int = STEPS) -> None:
        self._scheduler, self._transformer, self._arguments = pipe.scheduler, transformer, arguments
        self.steps = steps
        self._drawn = 0

    def __call__(self) -> None:
        known, device = self._arguments, self._arguments["timestep"].device
        self._scheduler.set_timesteps(self.steps, device=device)
        generator = torch.Generator(device).manual_seed(self._drawn)
        self._drawn += 1
        pooled = torch.empty_like(known["pooled_projections"]).normal_(generator=generator)
        for time in self._scheduler.timesteps:
            timestep = time.expand(known["timestep"].shape).to(known["timestep"].dtype) / 1000
            call(self._transformer, {**known, "pooled_projections": pooled, "timestep": timestep})

    def step_ms(self, device: torch.device) -> float:
        """Median over pictures of a picture's time for each step, after one that is not counted."""
        return median_milliseconds(self, device, _PICTURES, 1) / self.steps
