"""A module that ModelOpt quantized (`mtq.quantize`), read as a recipe; and a ModelOpt config that loses no layer.

Nothing here imports ModelOpt: its quantizers are read by their attributes (nvidia-modelopt 0.47). Weight ranges are not
read, because every merged weight gets a fresh one; ModelOpt's `max` algorithm computes the same number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .errors import InvalidOption, UnsupportedModel
from .flux.architecture import FluxArchitecture
from .fp8_recipe import (
    Activations,
    Fp8Config,
    Fp8Recipe,
    Granularity,
    block_linears,
    diffusers_linears,
    is_modulation,
    kinds_of,
    left_in_bf16,
    plan_recipe,
)

_LOG = logging.getLogger("trt_core.fp8")
_E4M3 = (4, 3)
_BLOCKS = ("transformer_blocks.*", "single_transformer_blocks.*")


def is_modelopt_quantized(model: nn.Module) -> bool:
    """Whether `mtq.quantize` was applied to this module."""
    return any("weight_quantizer" in module._modules for module in model.modules())


def modelopt_recipe(model: nn.Module, arch: FluxArchitecture, headroom: float = 2.0) -> Fp8Recipe:
    """The recipe that a ModelOpt-quantized diffusers transformer stands for; the model is not changed.

    Static where ModelOpt calibrated inputs, else dynamic; per row where a weight's scale is per channel; without mean
    inputs, of which ModelOpt has none. A linear that ModelOpt left in bf16 is excluded, a fused one when any of its
    parts is, and all of them are logged as a warning: ModelOpt's default config leaves out every `proj_out`, a seventh
    of FLUX's arithmetic.

    Raises:
        UnsupportedModel: another format than FP8 E4M3, scales per block of channels, SmoothQuant or AWQ.
        InvalidOption: ModelOpt was not calibrated, or calibrated on zeros or NaN.
    """
    modules = {name: _quantized(model, paths) for name, paths in diffusers_linears(arch).items()}
    used = {name: found for name, found in modules.items() if found and (is_modulation(name) or _input_too(found))}
    amax = {name: _input_amax(name, found) for name, found in used.items() if not is_modulation(name)}
    static = _all_static(amax)
    weights = [module.weight_quantizer for found in used.values() for module in found]
    config = Fp8Config(
        Granularity.ROW if any(quantizer.axis is not None for quantizer in weights) else Granularity.TENSOR,
        Activations.STATIC if static else Activations.DYNAMIC,
        tuple(name for name in block_linears(arch) if name not in used),
        headroom,
    )
    recipe = plan_recipe(arch, config, {name: value for name, value in amax.items() if value is not None})
    _report(recipe, arch)
    return recipe


def modelopt_config(config: Fp8Config | None = None) -> dict[str, Any]:
    """A config for `mtq.quantize` on diffusers' FLUX transformer that means the same as `config`, for ModelOpt 0.47.

    All linears of all blocks and nothing else: no `proj_out` is lost, no layer norm, stem or final layer is quantized.
    Modulations get FP8 weights and plain inputs. Default: per tensor and static, as ModelOpt's FP8_DEFAULT_CFG.
    `exclude` are patterns on diffusers' names.
    """
    config = config or Fp8Config(Granularity.TENSOR, Activations.STATIC)
    weight = {"num_bits": _E4M3, "axis": 0 if config.granularity is Granularity.ROW else None}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for blocks in _BLOCKS:
        entries.append({"quantizer_name": f"{blocks}weight_quantizer", "parent_class": "nn.Linear", "cfg": weight})
        entries.append(
            {"quantizer_name": f"{blocks}input_quantizer", "parent_class": "nn.Linear", "cfg": _input_cfg(config)}
        )
        entries.append({"quantizer_name": f"{blocks}.norm*.linear.input_quantizer", "enable": False})
    entries += [{"quantizer_name": f"{pattern}.*quantizer", "enable": False} for pattern in config.exclude]
    return {"quant_cfg": entries, "algorithm": "max"}


def _input_cfg(config: Fp8Config) -> dict[str, Any]:
    if config.activations is Activations.STATIC:
        return {"num_bits": _E4M3, "axis": None}
    if config.granularity is Granularity.TENSOR:
        return {"num_bits": _E4M3, "axis": None, "type": "dynamic"}
    return {"num_bits": _E4M3, "type": "dynamic", "block_sizes": {-1: None}}


def _quantized(model: nn.Module, paths: Iterable[str]) -> list[Any]:
    """The modules of one fused linear if all of them have FP8 weights, else nothing."""
    modules = [model.get_submodule(path) for path in paths]
    for path, module in zip(paths, modules, strict=True):
        quantizer = module._modules.get("weight_quantizer")
        if quantizer is None or not quantizer.is_enabled:
            return []
        _require_e4m3(f"{path}'s weight", quantizer)
    return modules


def _input_too(modules: list[Any]) -> bool:
    """Whether ModelOpt quantizes the common input of these modules; weight-only layers are no gain here."""
    return all(module.input_quantizer.is_enabled for module in modules)


def _input_amax(name: str, modules: list[Any]) -> float | None:
    """The range of these modules' common input; None where its scale is dynamic."""
    quantizers = [module.input_quantizer for module in modules]
    for quantizer in quantizers:
        _require_e4m3(f"{name}'s input", quantizer)
    if all(quantizer._dynamic for quantizer in quantizers):
        return None
    amax = [quantizer.amax for quantizer in quantizers]
    if any(value is None for value in amax):
        raise InvalidOption(
            f"ModelOpt has no range for the input of {name}: the model was quantized and never calibrated.",
            fix="Pass a forward_loop to mtq.quantize, or use dynamic scales.",
            widget="calibration",
        )
    return max(float(value.detach().abs().max()) for value in amax)


def _require_e4m3(what: str, quantizer: Any) -> None:
    reason = None
    if not hasattr(quantizer, "num_bits"):
        reason = "several formats one after the other"
    elif quantizer.num_bits != _E4M3:
        reason = f"num_bits={quantizer.num_bits}"
    elif any(size is not None for axis, size in (quantizer.block_sizes or {}).items() if isinstance(axis, int)):
        reason = "one scale per block of channels"
    elif quantizer.pre_quant_scale is not None:
        reason = "a smoothing factor (SmoothQuant or AWQ)"
    if reason is not None:
        raise UnsupportedModel(
            f"ModelOpt quantized {what} with {reason}.",
            expected="FP8 E4M3 with one scale per tensor, per channel or per token.",
            fix="Use mtq.quantize(transformer, trt_core.modelopt_config(), forward_loop).",
        )


def _all_static(amax: Mapping[str, float | None]) -> bool:
    static = [name for name, value in amax.items() if value is not None]
    dynamic = [name for name, value in amax.items() if value is None]
    if static and dynamic:
        raise UnsupportedModel(
            f"ModelOpt gave the input of {static[0]} a static scale and that of {dynamic[0]} a dynamic one.",
            expected="All of one kind.",
        )
    return bool(static)


def _report(recipe: Fp8Recipe, arch: FluxArchitecture) -> None:
    left = left_in_bf16(arch, recipe)
    _LOG.info("TRT FP8: %d layers quantized by ModelOpt", len(recipe.linears))
    if left:
        _LOG.warning(
            "TRT FP8: ModelOpt's config left %d of %d block layers in bf16: %s. modelopt_config() loses none.",
            len(left), len(left) + len(recipe.linears), kinds_of(left),
        )  # fmt: skip
