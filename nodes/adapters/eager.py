"""What cannot run compiled, and why: the whole model, single blocks, or one call. Each answer is a reason or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from . import weights
from .lora_patches import why_resized
from .resident import Resident

APPLY_COMPILED = "torch.compile"
"""Key of the wrapper with which ComfyUI's own compile nodes run the whole model."""
_COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_eager_model(patcher: Any, resident: Resident) -> str:
    """Why ComfyUI runs the whole model this time, loaded and patched its own way; "" where blocks can be compiled."""
    if patcher.hook_patches or patcher.forced_hooks is not None:
        return "the conditioning has LoRA hooks, which change weights within a run"
    if patcher.get_additional_models_with_key("multigpu"):
        return "the model is spread over several GPUs"
    if comfy.model_management.in_training:
        return "it is being trained"
    replaced = {"diffusion_model", *(weights.PREFIX + kind for kind in weights.BLOCK_LISTS)} & set(
        patcher.object_patches
    )  # fmt: skip
    if replaced:
        return f"another node replaces {min(replaced)}"
    if APPLY_COMPILED in patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}):
        return "a TorchCompileModel node compiles it already; take one of the two nodes out"
    if resident.dtype not in _COMPUTE_DTYPES:
        return f"ComfyUI computes it in {str(resident.dtype).removeprefix('torch.')}"
    if not resident.fits():
        return f"its blocks ({resident.size_bytes / 1e9:.1f} GB) do not fit on this device"
    if resident.refused and not resident.room():
        return resident.refused
    return why_resized(patcher, resident.names) or ""


def foreign_blocks(patcher: Any) -> frozenset[str]:
    """Blocks that ComfyUI loads, patches and runs as if we were not there: their weights are not those of the model."""
    changed = [*patcher.object_patches, *patcher.weight_wrapper_patches]
    names = (weights.block_of(key.removeprefix(weights.PREFIX)) for key in changed)
    return frozenset(name for name in names if name)


def why_eager_blocks(flux: nn.Module, foreign: frozenset[str]) -> dict[str, str]:
    """Block -> reason, for blocks that another node changed from inside (bypass LoRA, hooks)."""
    reasons = dict.fromkeys(foreign, "another node replaces it or its weights")
    for name in weights.block_names(flux):
        for module in flux.get_submodule(name).modules():
            if _has_other_forward(module):
                reasons.setdefault(name, f"another node changed the forward of a {type(module).__name__} in it")
            elif module._forward_hooks or module._forward_pre_hooks:
                reasons.setdefault(name, "it has forward hooks")
    return reasons


def why_eager_call(options: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """Why ComfyUI's own blocks run in this call, on the bound weights."""
    patches = options.get("patches", {})
    for kind in ("attn1_patch", "attn1_output_patch"):
        if patches.get(kind):
            return f"another node patches attention ({kind})"
    if "optimized_attention_override" in options:
        return "another node overrides attention"
    if kwargs.get("ref_latents_method") == "index_timestep_zero":
        return "reference latents at timestep zero"
    return ""


def _has_other_forward(module: nn.Module) -> bool:
    """ComfyUI's bypass LoRA leaves the class's own method on the module when it goes."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
