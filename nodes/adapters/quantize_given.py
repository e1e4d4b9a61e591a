"""FP8 checkpoints as ComfyUI holds them: which layers are FP8 already, and their bits for binding.

Scaled FP8 files have a scale per layer and may have one for its input; "weight_dtype fp8_e4m3fn" makes weights without
scales, which are 1. Everything else that is quantized (E5M2, NVFP4, INT8) is widened to the compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...trt_core.errors import UnsupportedGPU
from ...trt_core.flux.precision import FP8
from ...trt_core.fp8_recipe import Fp8Recipe, Granularity, block_linears, is_modulation
from ...trt_core.given_fp8 import GivenFp8, given_recipe
from ...trt_core.gpu import current_gpu, why_not_fp8
from . import weights

_E4M3_LAYOUTS = ("TensorCoreFP8E4M3Layout", "TensorCoreFP8Layout")


def recipe_as_given(patcher: Any) -> Fp8Recipe | None:
    """The recipe that the model's own FP8 layers make, None where it has none or this device multiplies no FP8."""
    flux = weights.flux_of(patcher)
    if _why_not(patcher.load_device):
        return None
    found = {name: _scale(patcher, flux, name) for name in block_linears(weights.architecture(flux))}
    given = {name: scale for name, scale in found.items() if scale is not None}
    if not given:
        return None
    rows = any(scale.numel() > 1 for scale in given.values())
    scales = {name: _input_scale(flux.get_submodule(name)) for name in given}
    return given_recipe(scales, Granularity.ROW if rows else Granularity.TENSOR)


def read_given(patcher: Any, name: str, recipe: Fp8Recipe, device: torch.device) -> GivenFp8:
    """A copy on `device` of the FP8 weight `name` with its scale: one number, or one per row as the recipe has it."""
    weight, layer = weights.raw_base(patcher, weights.key_of(name)), name.removesuffix(".weight")
    scale = _scale(patcher, weights.flux_of(patcher), layer)
    bits = weight._qdata if isinstance(weight, QuantizedTensor) else weight.to(FP8)
    if scale is None:
        raise ValueError(f"{name} is not FP8")
    scale = scale.detach().to(device, torch.float32).reshape(-1, 1)
    if recipe.config.granularity is Granularity.ROW:
        scale = scale.expand(weight.shape[0], 1)
    return GivenFp8(bits.detach().to(device, copy=True), scale.clone())


def _scale(patcher: Any, flux: nn.Module, layer: str) -> Tensor | None:
    """The scale of a layer's weight, None where it is not in FP8 or its file asks for full precision.

    Modulations multiply unquantized inputs, so they may be in FP8 in either case.
    """
    key = weights.key_of(f"{layer}.weight")
    weight = weights.raw_base(patcher, key)
    if not isinstance(weight, QuantizedTensor):
        stored = weights.stored_dtype(patcher, key) or weight.dtype
        return torch.ones(1) if stored is FP8 and not weight.is_meta else None
    scale = weight._params.scale
    full_precision = getattr(flux.get_submodule(layer), "_full_precision_mm_config", False)
    if weight._layout_cls not in _E4M3_LAYOUTS or scale.numel() not in (1, weight.shape[0]):
        return None
    return None if full_precision and not is_modulation(layer) else scale


def _input_scale(module: nn.Module) -> float | None:
    scale = getattr(module, "input_scale", None)
    return None if scale is None or scale.numel() != 1 else float(scale)


def require_fp8_products(device: torch.device) -> None:
    """Raises `UnsupportedGPU` where compiled blocks cannot multiply FP8; the CPU does in fp32, for tests."""
    if reason := _why_not(device):
        raise UnsupportedGPU(
            f"FP8 cannot run here: {reason}.", expected="GPUs from RTX 40 on (sm 8.9) multiply FP8.",
            fix="Take FP8 Quantize out to run in bf16. Or take this node out: ComfyUI then keeps the weights in FP8 "
            "and multiplies in bf16, which saves memory.",
        )  # fmt: skip


def _why_not(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    return (why_not_fp8(current_gpu()) or "") if device.type == "cuda" else f"{device.type} is not supported"
