"""20 Euler steps: how the errors of FP8's calls add up, beside fp32's way and white noise of the same size.

Where the errors of the steps resemble each other, as those of rounded weights do, they add up faster than noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fake_quant import FakeAttention, fake_quantized
from .fp8_calls import at, attention_is_fp8, call, exact
from .lines import Line
from .process import relative

STEPS = 20
Velocity = Callable[[Tensor, float], Tensor]
"""(latent in fp32, sigma) to the model's output in fp32."""
Call = dict[str, Tensor]


def trajectory(velocity: Velocity, start: Tensor) -> list[Tensor]:
    """The latent after each Euler step from sigma 1 to 0."""
    latents = [start]
    for sigma, following in itertools.pairwise(_sigmas()):
        latents.append(latents[-1] + (following - sigma) * velocity(latents[-1], sigma))
    return latents[1:]


@dataclass(frozen=True, slots=True)
class ExactWay:
    """What fp32 makes of a start: `latents` before and after each step, and the `velocities` in between."""

    wide: Any
    arguments: Call
    latents: Sequence[Tensor]
    velocities: Sequence[Tensor]

    @classmethod
    def of(cls, wide: Any, arguments: Call) -> ExactWay:
        velocities: list[Tensor] = []

        def kept(latent: Tensor, sigma: float) -> Tensor:
            velocities.append(in_fp32(wide, arguments, latent, sigma))
            return velocities[-1]

        start = arguments["hidden_states"].float()
        return cls(wide, arguments, [start, *trajectory(kept, start)], velocities)

    def velocity(self, latent: Tensor, sigma: float) -> Tensor:
        return in_fp32(self.wide, self.arguments, latent, sigma)

    def step_errors(self, velocity: Velocity) -> list[float]:
        """Relative errors of single calls along this way."""
        points = zip(self.latents, _sigmas(), self.velocities, strict=False)
        return [relative(velocity(latent, sigma), truth) for latent, sigma, truth in points]

    def curve(self, velocity: Velocity) -> list[float]:
        """Relative errors of the latent after each step of a way of its own."""
        own = trajectory(velocity, self.latents[0])
        return [relative(x, truth) for x, truth in zip(own, self.latents[1:], strict=True)]


def in_fp32(wide: Any, arguments: Call, latent: Tensor, sigma: float) -> Tensor:
    """fp32's output. Times as a host rounds them; the latent is not rounded here."""
    return call(wide, {**exact(at(arguments, latent, sigma)), "hidden_states": latent})


def euler_line(ours: Any, way: ExactWay, simulate: bool = False) -> Line:
    """FP8's way, beside fp32's with white noise of FP8's mean error of one call; `simulate`: and the simulation's."""

    def in_fp8(latent: Tensor, sigma: float) -> Tensor:
        return call(ours, at(way.arguments, latent, sigma)).float()

    errors = way.step_errors(in_fp8)
    noise, fp8 = way.curve(noisy(way.velocity, sum(errors) / len(errors))), way.curve(in_fp8)
    line = {"kind": "euler", "steps": STEPS, "step_errors": errors, **curves(fp8, noise, "noise")}
    if simulate:
        with fake_quantized(way.wide), FakeAttention() if attention_is_fp8(ours) else nullcontext():
            line |= curves(fp8, way.curve(way.velocity), "simulated")
    return line


def noisy(velocity: Velocity, error: float) -> Velocity:
    """The same with white noise whose norm is `error` of the output's."""

    def disturbed(latent: Tensor, sigma: float) -> Tensor:
        truth, generator = velocity(latent, sigma), torch.Generator(latent.device)
        generator.manual_seed(round(sigma * STEPS))
        white = torch.randn(truth.shape, generator=generator, device=truth.device)
        return truth + white * (error * truth.norm() / white.norm())

    return disturbed


def curves(fp8: Sequence[float], other: Sequence[float], name: str) -> Line:
    """Relative errors of the latent after each step, and FP8's as multiples of the other's.

    Growth is from the first step to the last, in multiples of white noise's: 1 where errors of steps are independent.
    """
    ratios = [one / two for one, two in zip(fp8, other, strict=True)]
    line: Line = {"latent_errors": list(fp8), f"{name}_errors": list(other)}
    line |= {f"last_ratio_to_{name}": ratios[-1], f"largest_ratio_to_{name}": max(ratios)}
    return {**line, "growth": ratios[-1] / ratios[0]} if name == "noise" else line


def other_calls(arguments: Call) -> list[Call]:
    """Calls of the same sizes with other latents, texts and times, for calibration."""
    generator = torch.Generator(arguments["hidden_states"].device).manual_seed(99)

    def others(known: Tensor) -> Tensor:
        drawn = torch.randn(known.shape, generator=generator, device=known.device) * known.float().std()
        return drawn.to(known.dtype)

    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    return [
        {**arguments, **{name: others(arguments[name]) for name in names},
         "timestep": torch.full_like(arguments["timestep"], sigma)}
        for sigma in (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
    ]  # fmt: skip


def _sigmas() -> list[float]:
    return [1 - step / STEPS for step in range(STEPS + 1)]
