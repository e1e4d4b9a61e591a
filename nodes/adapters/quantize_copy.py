"""The model once more, in ComfyUI's own FP8 format: what Load Diffusion Model makes of the file that Save FP8 Model
would write."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ...trt_core.errors import UnsupportedModel
from ...trt_core.flux import fp8
from ...trt_core.fp8_recipe import Fp8Recipe, is_modulation
from ...trt_core.host import Progress, stop_if_cancelled
from . import weights

_STAGE = "Quantizing to FP8"
_WORKING_BYTES = 2**30
_FORMAT = "float8_e4m3fn"
_copies: weakref.WeakKeyDictionary[Any, Fp8Copy] = weakref.WeakKeyDictionary()
"""The last copy of each BaseModel: a LoRA node before ours makes us run again, on the same weights."""


class Fp8Copy:
    """A model in FP8, made when it is first sampled. It never refers to the model that it was made from."""

    def __init__(self, recipe: Fp8Recipe) -> None:
        self.recipe = recipe
        self._loaded: dict[Any, Any] = {}

    def patcher_for(self, patcher: Any, progress: Progress) -> Any:
        """The patcher as it is, with the FP8 model in place of its own."""
        kind = (patcher.is_dynamic(), patcher.load_device, patcher.offload_device)
        if kind not in self._loaded:
            self._loaded = {kind: _load(patcher, self.recipe, progress)}
        fresh = self._loaded[kind]
        clone = patcher.clone(model_override=fresh.get_clone_model_override())
        clone.parent, clone.hook_backup, clone.size = fresh, {}, fresh.model_size()
        return clone


def copy_of(patcher: Any, recipe: Fp8Recipe) -> Fp8Copy:
    """The copy for a recipe, the one from before where it is the same. Mean inputs do not count: a copy's biases are as
    they are in the model."""
    found = _copies.get(patcher.model)
    if found is None or found.recipe != recipe:
        found = _copies[patcher.model] = Fp8Copy(recipe)
    return found


def metadata(recipe: Fp8Recipe) -> dict[str, str]:
    """The header's metadata of a scaled FP8 file: which layers are in FP8.

    Modulations multiply unquantized activations, as the recipe has it.
    """
    layers = {
        name: {"format": _FORMAT, **({"full_precision_matrix_mult": True} if is_modulation(name) else {})}
        for name in sorted(recipe.linears)
    }
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def layer_tensors(layer: str, weight: Tensor, recipe: Fp8Recipe) -> dict[str, Tensor]:
    """The tensors of one FP8 layer under ComfyUI's names, where `weight` is; scales are fp32 scalars."""
    quantized, scale = fp8.merge_quantize(weight, None, 1.0, per_row=False)
    found = {f"{layer}.weight": quantized, f"{layer}.weight_scale": scale.reshape(())}
    if layer in recipe.input_amax:
        found[f"{layer}.input_scale"] = torch.tensor(recipe.input_scale(layer), dtype=torch.float32)
    return found


def state_dict(patcher: Any, recipe: Fp8Recipe, keys: Mapping[str, str], progress: Progress) -> dict[str, Tensor]:
    """All weights under BFL's names in host memory, the recipe's layers in FP8. LoRAs are left out."""
    found: dict[str, Tensor] = {}
    device, dtype = patcher.load_device, weights.compute_dtype(patcher)
    comfy.model_management.free_memory(_WORKING_BYTES, device)
    for name, key in _shown(keys, progress):
        layer = name.removesuffix(".weight")
        if layer in recipe.linears:
            tensors = layer_tensors(layer, weights.read_base(patcher, key, device, dtype), recipe)
            found |= {name: tensor.cpu() for name, tensor in tensors.items()}
        else:
            found[name] = weights.raw_base(patcher, key).detach().cpu()
    return found


def _shown(keys: Mapping[str, str], progress: Progress) -> Iterable[tuple[str, str]]:
    for done, item in enumerate(keys.items()):
        stop_if_cancelled(progress, _STAGE)
        progress.update(_STAGE, done, len(keys))
        yield item
    progress.update(_STAGE, len(keys), len(keys))


def _load(patcher: Any, recipe: Fp8Recipe, progress: Progress) -> Any:
    """A patcher of the FP8 model, loaded by ComfyUI's own loader."""
    tensors = state_dict(patcher, recipe, weights.all_weights(weights.flux_of(patcher)), progress)
    loaded = comfy.sd.load_diffusion_model_state_dict(
        tensors,
        model_options={"load_device": patcher.load_device, "offload_device": patcher.offload_device},
        metadata=metadata(recipe),
        disable_dynamic=not patcher.is_dynamic(),
    )
    if loaded is None:
        raise UnsupportedModel(
            "ComfyUI does not recognise this model in its FP8 format.", fix="Take this node out to run it in bf16."
        )
    return loaded
