"""FLUX's weights out of a ModelPatcher: which model it is, names, and base weights without any LoRA."""

from __future__ import annotations

from typing import Any

import comfy.ldm.flux.model
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...trt_core.errors import UnsupportedModel
from ...trt_core.flux.architecture import FluxArchitecture

BLOCK_LISTS = ("double_blocks", "single_blocks")
PREFIX = "diffusion_model."
_SUPPORTED = "FLUX.1 dev, schnell, Krea, Kontext, Fill, Canny and Depth can be compiled."


def flux_of(patcher: Any) -> nn.Module:
    return patcher.model.diffusion_model


def require_flux(patcher: Any) -> None:
    """Raises `UnsupportedModel`, saying what the model is instead, unless its blocks can be bound."""
    flux = getattr(patcher.model, "diffusion_model", None)
    if type(flux) is not comfy.ldm.flux.model.Flux or not _is_flux_1(flux.params):
        raise UnsupportedModel(
            f"This model is {type(patcher.model).__name__}, not FLUX.1.", expected=_SUPPORTED,
            fix="Connect a FLUX.1 model, or take this node out.", widget="model",
        )  # fmt: skip
    if _is_gguf(flux.double_blocks[0].img_attn.qkv.weight):
        raise UnsupportedModel(
            "This is a GGUF model: its weights stay packed and cannot be bound.",
            expected="Compiling needs a .safetensors model (bf16, fp16, fp8 or scaled fp8).",
            fix="Load one with Load Diffusion Model, or take this node out.", widget="model",
        )  # fmt: skip


def architecture(flux: nn.Module) -> FluxArchitecture:
    shapes = {bfl_name(name): tuple(parameter.shape) for name, parameter in flux.named_parameters()}
    return FluxArchitecture.from_shapes(shapes, tuple(flux.params.axes_dim))


def block_names(flux: nn.Module) -> list[str]:
    """ "double_blocks.0" and so on."""
    return [f"{kind}.{index}" for kind in BLOCK_LISTS for index in range(len(getattr(flux, kind)))]


def block_of(name: str) -> str:
    """The block that holds a weight: "double_blocks.3" of "double_blocks.3.img_attn.qkv.weight", "" of others."""
    kind, _, rest = name.partition(".")
    return f"{kind}.{rest.partition('.')[0]}" if kind in BLOCK_LISTS else ""


def bfl_name(name: str) -> str:
    """Black Forest Labs' name of a parameter: ComfyUI calls the scale of q's and k's norm "weight"."""
    return f"{name.removesuffix('weight')}scale" if name.endswith("_norm.weight") else name


def key_of(name: str) -> str:
    """The patcher's key of a weight by its BFL name."""
    return PREFIX + (f"{name.removesuffix('scale')}weight" if name.endswith("_norm.scale") else name)


def block_weights(flux: nn.Module) -> dict[str, str]:
    """BFL name -> key in the patcher ("diffusion_model....weight") of every weight in the blocks."""
    return {name: key for name, key in all_weights(flux).items() if name.startswith(BLOCK_LISTS)}


def all_weights(flux: nn.Module) -> dict[str, str]:
    """BFL name -> key in the patcher of every weight; a quantized layer has scales beside them, which are none."""
    names = (name for name, _ in flux.named_parameters() if name.endswith((".weight", ".bias")))
    return {bfl_name(name): PREFIX + name for name in names}


def compute_dtype(patcher: Any) -> torch.dtype:
    """What ComfyUI computes this model in."""
    manual_cast = patcher.get_model_object("manual_cast_dtype")
    return manual_cast or patcher.model.diffusion_model.dtype


def raw_base(patcher: Any, key: str) -> Tensor:
    """The weight without LoRAs as ComfyUI holds it: any device, dtype or quantization.

    Key by key, because `get_key_patches` fails for scaled fp8. The backup first: what a hook LoRA kept may already hold
    a merged one. Where another node's object is in the model's place, the backups are of that one's weights.
    """
    if _replaced(patcher, key) is None:
        if key in patcher.backup:
            return patcher.backup[key].weight
        if key in patcher.hook_backup:
            return patcher.hook_backup[key][0]
    return _original(patcher, key)


def read_base(patcher: Any, key: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of the base weight on `device` in `dtype`, dequantized in fp32."""
    weight = raw_base(patcher, key)
    out = torch.empty(tuple(weight.shape), dtype=dtype, device=device)
    if weight.is_meta:  # missing in the file: ComfyUI takes zeros
        return out.zero_()
    if isinstance(weight, QuantizedTensor):
        return out.copy_(weight.to(device=device).to(dtype=torch.float32).dequantize())
    stored = stored_dtype(patcher, key) or weight.dtype
    return out.copy_(weight if weight.dtype == stored == dtype else weight.to(device).to(stored))


def stored_dtype(patcher: Any, key: str) -> torch.dtype | None:
    """What the loader was told to keep the weight in, such as fp8: under Dynamic VRAM it is still as in the file."""
    module, _, kind = key.rpartition(".")
    return getattr(_original(patcher, module), f"{kind}_comfy_model_dtype", None)


def _original(patcher: Any, path: str) -> Any:
    """What the model has at `path` by itself, also while another node's object is in its place."""
    replaced = _replaced(patcher, path)
    if replaced is None:
        return comfy.utils.get_attr(patcher.model, path)
    original, rest = patcher.object_patches_backup[replaced], path[len(replaced) + 1 :]
    return comfy.utils.get_attr(original, rest) if rest else original


def _replaced(patcher: Any, path: str) -> str | None:
    """The part of `path` at which another node's object is in the model now."""
    return next((key for key in patcher.object_patches_backup if f"{path}.".startswith(f"{key}.")), None)


def _is_flux_1(params: Any) -> bool:
    return (
        list(params.axes_dim) == [16, 56, 56]
        and params.vec_in_dim == 768
        and not (params.global_modulation or params.txt_norm or params.yak_mlp)
    )


def _is_gguf(weight: Any) -> bool:
    return hasattr(weight, "tensor_type") and hasattr(weight, "tensor_shape")
