"""What a recipe keeps of calibration, refused where nothing could be made of it: ranges for static scales, mean inputs
for the correction of biases.

Names are BFL's, without ".weight", as in `fp8_recipe`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import InvalidOption
from .flux.architecture import FluxArchitecture
from .flux.weights import weight_shapes

_BLOCKS = ("double_blocks.", "single_blocks.")


def kept_amax(
    arch: FluxArchitecture, layers: frozenset[str], input_amax: Mapping[str, float] | None
) -> dict[str, float]:
    """The ranges of `layers`, which all need one; those of other layers are left out. Raises `InvalidOption`."""
    amax = input_amax or {}
    check_amax(arch, amax)
    require_every_amax(layers, amax)
    return {name: float(amax[name]) for name in sorted(layers)}


def kept_means(
    arch: FluxArchitecture, layers: frozenset[str], input_mean: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Copies of the mean inputs of `layers`, fp32 [K] on the CPU; those of other layers are left out, and none stay
    none.

    Raises `InvalidOption` for means that do not fit, or where only some layers have one.
    """
    means = input_mean or {}
    check_means(arch, means)
    require_every_mean(layers, means)
    with torch.inference_mode(False):  # ComfyUI runs nodes in that mode, whose tensors cannot be written elsewhere
        return {name: means[name].detach().to("cpu", torch.float32, copy=True) for name in sorted(layers) if means}


def check_amax(arch: FluxArchitecture, input_amax: Mapping[str, float]) -> None:
    """Raises `InvalidOption` for an amax of a layer that the model has not, or that no scale can be made from."""
    _refuse_foreign(arch, input_amax, "ranges", "scales")
    for name, amax in input_amax.items():
        if not (math.isfinite(amax) and amax > 0):
            raise InvalidOption(
                f"Calibration saw a largest input of {amax} in {name}.",
                expected="A scale needs a finite number above zero.",
                fix="Calibrate with real inputs: prompts, or calls recorded from a run that gave good pictures.",
            )


def check_means(arch: FluxArchitecture, input_mean: Mapping[str, Tensor]) -> None:
    """Raises `InvalidOption` for the mean input of a layer that the model has not, of another length than its inputs,
    or with NaN or infinity."""
    _refuse_foreign(arch, input_mean, "mean inputs", "means")
    widths = input_widths(arch)
    for name, mean in input_mean.items():
        if mean.shape != (widths[name],):
            raise InvalidOption(
                f"The mean input of {name} has shape {tuple(mean.shape)}.",
                expected=f"One number for each of its {widths[name]} inputs.",
                fix="Calibrate this model, or load the means that were made with it.",
            )
        if not mean.isfinite().all():
            raise InvalidOption(
                f"Calibration saw a mean input of {float(mean[~mean.isfinite()][0])} in {name}.",
                expected="The correction of a bias needs finite numbers.",
                fix="Calibrate with real inputs: prompts, or calls recorded from a run that gave good pictures.",
            )


def refuse_amax(input_amax: Mapping[str, float] | None) -> None:
    """Raises `InvalidOption` for any range: dynamic activations have none."""
    if input_amax:
        raise InvalidOption(
            "Calibrated ranges were given, but activations are dynamic: they measure themselves at each call.",
            fix="Leave the ranges out, or choose static activations.",
            widget="activations",
        )


def require_every_amax(layers: frozenset[str], input_amax: Mapping[str, float]) -> None:
    """Raises `InvalidOption` where a layer has no range."""
    missing = sorted(layers - set(input_amax))
    if missing:
        raise InvalidOption(
            "Static activations need a calibrated range for each layer, and "
            f"{len(missing)} of {len(layers)} have none; the first is {missing[0]}.",
            fix="Calibrate the model, or choose dynamic activations, which need no calibration.",
            widget="activations",
        )


def require_every_mean(layers: frozenset[str], input_mean: Mapping[str, Tensor]) -> None:
    """Raises `InvalidOption` where some layers have a mean input and others have none."""
    missing = sorted(layers - set(input_mean))
    if input_mean and missing:
        raise InvalidOption(
            "Biases are corrected in all layers or in none, and "
            f"{len(missing)} of {len(layers)} have no mean input; the first is {missing[0]}.",
            fix="Calibrate the model, or leave the means out.",
            widget="calibration",
        )


def refuse_other_means(layers: frozenset[str], input_mean: Mapping[str, Tensor]) -> None:
    """Raises `InvalidOption` for the mean input of any other layer: nothing there is corrected."""
    others = sorted(set(input_mean) - layers)
    if others:
        raise InvalidOption(
            f"The FP8 recipe has a mean input of {others[0]}, whose input is not in FP8 ({len(others)} such layers).",
            expected="Only layers that multiply FP8 have one, and modulations never do.",
            fix="Make the recipe with plan_recipe(), which leaves others out.",
        )


def _refuse_foreign(arch: FluxArchitecture, given: Mapping[str, object], what: str, made: str) -> None:
    foreign = sorted(set(given) - set(input_widths(arch)))
    if foreign:
        raise InvalidOption(
            f"The calibrated {what} are of another model: they name {foreign[0]}, which this one has not "
            f"({len(foreign)} such names).",
            expected=f"This model has {arch.double_depth} double and {arch.single_depth} single blocks.",
            fix=f"Calibrate this model, or load the {made} that were made with it.",
        )


def input_widths(arch: FluxArchitecture) -> dict[str, int]:
    """Each block linear, modulations included, in order of execution -> how many numbers one of its inputs has."""
    return {
        name.removesuffix(".weight"): shape[1]
        for name, shape in weight_shapes(arch).items()
        if len(shape) == 2 and name.startswith(_BLOCKS)
    }
