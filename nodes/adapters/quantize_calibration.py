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

from ...trt_core.fp8_recipe import block_linears, check_amax, is_modulation
from ...trt_core.host import Progress, stop_if_cancelled
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
    """What layers saw, by BFL name: the largest absolute input, and some inputs [rows, in] of the last step."""

    amax: dict[str, float]
    samples: dict[str, Tensor]


def calibrated(patcher: Any, calibration: Calibration, progress: Progress) -> Seen:
    """The inputs of every block linear but modulations, LoRAs on the patcher included.

    Raises `InvalidOption` where a layer saw NaN, infinity or nothing but zeros, `BuildCancelled` when cancelled.
    """
    flux = weights.flux_of(patcher)
    arch = weights.architecture(flux)
    watch = _Watch()
    with watch.on(flux, [name for name in block_linears(arch) if not is_modulation(name)]):
        _sample(patcher, calibration, progress)
    amax = {name: float(largest) for name, largest in watch.amax.items()}
    check_amax(arch, amax)
    return Seen(amax, watch.samples)


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
    """Running maxima on the model's device: calibration runs at the model's own speed."""

    def __init__(self) -> None:
        self.amax: dict[str, Tensor] = {}
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
        # aminmax allocates nothing of the input's size, and NaN survives it and maximum.
        low, high = torch.aminmax(args[0])
        amax = torch.maximum(low.abs(), high.abs()).float()
        before = self.amax.get(name)
        self.amax[name] = amax if before is None else torch.maximum(before, amax)
        rows = args[0].flatten(0, -2)
        self.samples[name] = rows[:: max(1, rows.shape[0] // _SAMPLE_ROWS)][:_SAMPLE_ROWS].clone()
