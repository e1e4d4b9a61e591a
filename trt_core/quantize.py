"""FP8 for diffusers: `quantize_fp8_(pipe)` decides layers and scales, `compile_transformer(pipe)` then runs them.

The transformer's own parameters stay the bf16 base; only a recipe is attached to it. LoRAs are merged into that base
and each merged weight is rounded to FP8 once, so that no change of LoRA ever starts from rounded weights.
"""

from __future__ import annotations

import copy
import importlib
import logging
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration, collect_input_ranges, counted, feed_of, require_calls
from .diffusers_adapter import architecture_of, flux_class, restore_transformer
from .errors import InvalidOption, MissingDependency, UnsupportedModel
from .flux.architecture import FluxArchitecture
from .fp8_recipe import (
    Activations,
    Fp8Config,
    Fp8Recipe,
    attach_recipe,
    attached_recipe,
    check_recipe,
    detach_recipe,
    excluded_linears,
    plan_recipe,
)
from .host import Progress
from .modelopt_input import is_modelopt_quantized, modelopt_config, modelopt_recipe
from .packages import install_line, installed
from .terminal import TerminalProgress

_LOG = logging.getLogger("trt_core.fp8")
_MODELOPT, _MODELOPT_SINCE = "nvidia-modelopt", (0, 47)
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def quantize_fp8_(
    model: Any,
    config: Fp8Config | None = None,
    *,
    calibration: Calibration | None = None,
    recipe: Fp8Recipe | None = None,
    progress: Progress | None = None,
    allow_few: bool = False,
) -> Fp8Recipe:
    """The recipe, which is attached to the transformer in place; its weights stay as they are.

    Call it before `compile_transformer`. A compiled transformer is restored first and has to be compiled again.

    model: a diffusers FLUX pipeline or its transformer. One that ModelOpt quantized brings its own recipe along.
    config: layers and kinds of scales; None is per row with dynamic scales, which needs no data.
    calibration: for static scales and for the correction of biases: prompts (needs a pipeline), recorded calls, or a
        function of the transformer. Dynamic scales need none; with it, the recipe has the mean inputs alone.
    recipe: one from before (`load_recipe(path, flux_architecture(pipe))`), in place of `config` and `calibration`.
    progress: None shows a bar in the terminal.
    allow_few: accept what a single call shows.

    Raises `InvalidOption` for options or data that do not fit, `UnsupportedModel` for another or an already quantized
    model, `BuildCancelled`; the transformer has no recipe then.
    """
    transformer = flux_transformer(model)
    _refuse_quantized(transformer)
    arch = flux_architecture(transformer)
    if recipe is not None:
        _refuse_beside_recipe(config, calibration)
        check_recipe(recipe, arch)
    elif is_modelopt_quantized(transformer):
        recipe = _from_modelopt(transformer, arch, config, calibration)
    elif calibration is None:
        recipe = _uncalibrated(arch, config or Fp8Config())
    _restore_if_compiled(transformer)
    if recipe is None:
        progress = progress or TerminalProgress()
        recipe = _calibrated(model, arch, config or Fp8Config(), calibration, progress, allow_few)
    attach_recipe(transformer, recipe)
    return recipe


def dequantize_(model: Any) -> Fp8Recipe | None:
    """Takes the recipe off the transformer again and returns it; None where there is none.

    A compiled transformer is restored and has to be compiled again.
    """
    transformer = flux_transformer(model)
    if attached_recipe(transformer) is not None:
        _restore_if_compiled(transformer)
    return detach_recipe(transformer)


def calibrate_with_modelopt(
    model: Any,
    calibration: Calibration,
    config: Fp8Config | None = None,
    *,
    progress: Progress | None = None,
    allow_few: bool = False,
) -> Fp8Recipe:
    """The static recipe from ModelOpt's `max` calibration, for `quantize_fp8_(model, recipe=...)`.

    ModelOpt converts a copy of the transformer that shares its weights, so the model itself stays as it is; it must lie
    on its device as a whole. It collects no mean inputs, so this recipe corrects no bias; that of `quantize_fp8_` with
    calibration does. `config` is static, per row by default.

    Raises `MissingDependency` without ModelOpt, and what `quantize_fp8_` raises.
    """
    mtq = _import_modelopt()
    config = config or Fp8Config(activations=Activations.STATIC)
    if config.activations is Activations.DYNAMIC:
        raise _needs_no_calibration()
    transformer = flux_transformer(model)
    _refuse_quantized(transformer)
    arch = flux_architecture(transformer)
    excluded_linears(arch, config.exclude)
    _restore_if_compiled(transformer)
    feed = feed_of(calibration, model)
    copied = _sharing_copy(transformer)
    try:
        with torch.no_grad(), counted(copied, feed.calls, progress or TerminalProgress()) as calls:
            mtq.quantize(copied, modelopt_config(replace(config, exclude=())), feed.run)
    except AssertionError as error:  # how ModelOpt's calibrator refuses NaN and infinity
        raise InvalidOption(f"ModelOpt stopped calibrating: {error}.", widget="calibration") from error
    require_calls(calls.number, allow_few)
    found = modelopt_recipe(copied, arch, config.headroom)
    return plan_recipe(arch, config, found.input_amax)


def flux_transformer(model: Any) -> nn.Module:
    """The FLUX transformer of a pipeline, or the transformer itself; raises `UnsupportedModel` for anything else."""
    transformer = getattr(model, "transformer", None)
    transformer = model if transformer is None else transformer
    if not isinstance(transformer, flux_class()):
        raise UnsupportedModel(
            f"{type(transformer).__name__} is not a FLUX.1 transformer.",
            expected="FP8 takes a diffusers FLUX pipeline, or its FluxTransformer2DModel.",
        )
    return transformer


def flux_architecture(model: Any) -> FluxArchitecture:
    """The numbers of a pipeline's transformer, which `save_recipe` and `load_recipe` ask for."""
    return architecture_of(flux_transformer(model))


def _uncalibrated(arch: FluxArchitecture, config: Fp8Config) -> Fp8Recipe:
    if config.activations is Activations.STATIC:
        raise InvalidOption(
            "Static activations need calibration, and none was given.",
            fix="Pass calibration=[prompt, ...] with the pipeline, load a saved recipe, or choose dynamic activations.",
            widget="calibration",
        )
    return plan_recipe(arch, config)


def _calibrated(
    model: Any, arch: FluxArchitecture, config: Fp8Config, calibration: Calibration, progress: Progress, allow_few: bool
) -> Fp8Recipe:
    excluded_linears(arch, config.exclude)  # a mistyped pattern is said before minutes of calibration
    feed = feed_of(calibration, model)
    found = collect_input_ranges(flux_transformer(model), arch, feed, progress, allow_few=allow_few)
    amax = found.amax if config.activations is Activations.STATIC else None
    return plan_recipe(arch, config, amax, found.mean)


def _from_modelopt(
    transformer: nn.Module, arch: FluxArchitecture, config: Fp8Config | None, calibration: Calibration | None
) -> Fp8Recipe:
    """ModelOpt's own recipe; `config` may add excluded layers and set the headroom."""
    if calibration is not None:
        raise InvalidOption(
            "ModelOpt has quantized and calibrated this transformer already.",
            fix="Leave calibration out, or load the model anew without ModelOpt.",
            widget="calibration",
        )
    found = modelopt_recipe(transformer, arch, (config or Fp8Config()).headroom)
    if config is None:
        return found
    if (config.granularity, config.activations) != (found.config.granularity, found.config.activations):
        raise InvalidOption(
            f"ModelOpt quantized this transformer per {found.config.granularity.value} with "
            f"{found.config.activations.value} activations, which is not what config asks for.",
            fix="Leave config out, or load the model anew without ModelOpt.",
        )
    excluded_linears(arch, config.exclude)
    both = replace(found.config, exclude=found.config.exclude + config.exclude)
    return plan_recipe(arch, both, found.input_amax)


def _refuse_quantized(transformer: nn.Module) -> None:
    if attached_recipe(transformer) is not None:
        raise InvalidOption(
            "This transformer has an FP8 recipe already.", fix="Call dequantize_() first to choose another one."
        )
    for name, parameter in transformer.named_parameters():
        if parameter.dtype not in _PLAIN or type(parameter.data) is not Tensor:
            raise UnsupportedModel(
                f"This transformer is quantized already: {name} is {type(parameter.data).__name__} of "
                f"{str(parameter.dtype).removeprefix('torch.')}.",
                expected="FP8 starts from bf16, fp16 or fp32 weights: what was rounded once cannot take LoRAs exactly.",
                fix="Load the model without quantization and without layerwise casting.",
            )


def _refuse_beside_recipe(config: Fp8Config | None, calibration: Calibration | None) -> None:
    if config is not None or calibration is not None:
        given = "config" if config is not None else "calibration"
        raise InvalidOption(
            f"Both recipe and {given} were given.",
            expected="A recipe holds its config and its calibrated ranges and means.",
            fix=f"Leave {given} out; to change a recipe, replan with plan_recipe(arch, config, recipe.input_amax, "
            "recipe.input_mean).",
        )


def _restore_if_compiled(transformer: nn.Module) -> None:
    before = type(transformer)
    restore_transformer(transformer)
    if type(transformer) is not before:
        _LOG.warning("TRT FP8: the transformer was compiled; call compile_transformer() again")


def _sharing_copy(transformer: nn.Module) -> nn.Module:
    """A copy of the module tree on the same parameters and buffers."""
    return copy.deepcopy(transformer, {id(t): t for t in (*transformer.parameters(), *transformer.buffers())})


def _import_modelopt() -> ModuleType:
    version = installed(_MODELOPT)
    since = ".".join(map(str, _MODELOPT_SINCE))
    line = install_line(f"{_MODELOPT}>={since}")
    advice = {
        "expected": f"This needs {_MODELOPT} {since} or newer.",
        "fix": f"Run: {line}\nWithout it, quantize_fp8_(model, config, calibration=...) calibrates to the same ranges, "
        "and dynamic scales need none.",
    }
    if version is None:
        raise MissingDependency("ModelOpt is not installed.", **advice)
    if tuple(int(part) for part in version.split(".")[:2]) < _MODELOPT_SINCE:
        raise MissingDependency(f"ModelOpt {version} is installed.", **advice)
    try:
        return importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        raise MissingDependency(f"ModelOpt {version} cannot be imported ({error}).", **advice) from error


def _needs_no_calibration() -> InvalidOption:
    return InvalidOption(
        "ModelOpt calibrates ranges, and dynamic scales need none: activations are measured at each call.",
        fix="Choose Activations.STATIC, or pass calibration to quantize_fp8_(), which finds mean inputs for dynamic "
        "scales as well.",
        widget="activations",
    )
