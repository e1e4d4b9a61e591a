"""Calibration inside ComfyUI: a picture is sampled, and the inputs of every linear layer in the blocks are watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.sample
import torch
from torch import Tensor, nn

from ...trt_core.fp8_recipe import block_linears, is_modulation
from ...trt_core.host import Progress, stop_if_cancelled
from ...trt_core.input_ranges import InputRanges, RunningRanges
from . import weights

_STAGE = "Calibrating FP8"
_SAMPLE_ROWS = 64
"""Inputs per layer that are kept to measure what FP8 does to its output."""
_SEED = 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """A picture to make: ComfyUI's CONDITIONING, a LATENT for its size or none for 1024 x 1024 px, and steps."""

    conditioning: Any
    latent: Mapping[str, Any] | None
    steps: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What layers saw, by BFL name: the largest and the mean input, and some inputs [rows, in] of the last step."""

    inputs: InputRanges
    samples: dict[str, Tensor]


def calibrated(patcher: Any, calibration: Calibration, progress: Progress) -> Seen:
    """The inputs of every block linear but modulations, LoRAs on the patcher included.

    Whether they are numbers that scales can be made of, `plan_recipe` says. Raises `BuildCancelled` when cancelled.
    """
    flux = weights.flux_of(patcher)
    watch = _Watch()
    with watch.on(flux, [name for name in block_linears(weights.architecture(flux)) if not is_modulation(name)]):
        _sample(patcher, calibration, progress)
    return Seen(watch.running.ranges(), watch.samples)


def _sample(patcher: Any, calibration: Calibration, progress: Progress) -> None:
    latent = _latent(patcher, calibration.latent)
    steps = calibration.steps

    def after_step(step: int, *_: Any) -> None:
        progress.update(_STAGE, step + 1, steps)
        stop_if_cancelled(progress, _STAGE)

    progress.update(_STAGE, 0, steps)
    noise = comfy.sample.prepare_noise(latent, _SEED)
    comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", calibration.conditioning, calibration.conditioning, latent,
        callback=after_step, disable_pbar=True, seed=_SEED,
    )  # fmt: skip


def _latent(patcher: Any, given: Mapping[str, Any] | None) -> Tensor:
    if given is None:
        return torch.zeros(1, patcher.get_model_object("latent_format").latent_channels, 128, 128)
    return comfy.sample.fix_empty_latent_channels(patcher, given["samples"][:1])


class _Watch:
    """Collects the inputs of layers on the model's device."""

    def __init__(self) -> None:
        self.running = RunningRanges()
        self.samples: dict[str, Tensor] = {}

    @contextmanager
    def on(self, flux: nn.Module, names: list[str]) -> Iterator[None]:
        handles = [flux.get_submodule(name).register_forward_pre_hook(partial(self._see, name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.running.add_amax(name, args[0])
        self.running.add_mean(name, args[0])
        rows = args[0].flatten(0, -2)
        self.samples[name] = rows[:: max(1, rows.shape[0] // _SAMPLE_ROWS)][:_SAMPLE_ROWS].clone()
