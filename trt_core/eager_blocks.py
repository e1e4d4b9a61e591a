"""Which of a diffusers transformer's blocks must run as diffusers runs them, why, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .execution import Pe
from .extras import DoubleOverride, SingleOverride
from .forward_hooks import find_hooked, has_own_forward

_PLAIN_PROCESSORS = {"FluxAttnProcessor", "FluxAttnProcessor2_0"}
_BLOCK_LISTS = {"transformer_blocks", "single_transformer_blocks"}


def why_eager_model(model: nn.Module) -> str | None:
    """The reason why no block of the model can be compiled at the moment, or None."""
    if torch.is_grad_enabled() and model.training:
        return "it is being trained (gradients are on and the model is in training mode)"
    for name, part in model._modules.items():
        # accelerate's hooks here mean sequential offload, which binding refuses with advice.
        if part is not None and name not in _BLOCK_LISTS and (found := find_hooked(part, name, accelerate=False)):
            return f"{found} has hooks or another forward"
    return None


def why_eager_blocks(model: nn.Module) -> dict[str, str]:
    """Block ("double_blocks.3") -> reason, for blocks that somebody else changed."""
    kinds = (("double_blocks", model.transformer_blocks), ("single_blocks", model.single_transformer_blocks))
    reasons = {}
    for kind, blocks in kinds:
        for index, block in enumerate(blocks):
            if reason := _why_eager(block):
                reasons[f"{kind}.{index}"] = reason
    return reasons


def block_overrides(model: Any, eager: dict[str, str]) -> tuple[dict[int, DoubleOverride], dict[int, SingleOverride]]:
    """diffusers' own blocks as overrides for the compiled ones, by index."""
    doubles: dict[int, DoubleOverride] = {}
    singles: dict[int, SingleOverride] = {}
    for name in eager:
        kind, _, index = name.partition(".")
        if kind == "double_blocks":
            doubles[int(index)] = _double(model.transformer_blocks[int(index)])
        elif kind == "single_blocks":
            singles[int(index)] = _single(model.single_transformer_blocks[int(index)])
    return doubles, singles


def _why_eager(block: nn.Module) -> str | None:
    if has_own_forward(block) or getattr(block, "_hf_hook", None) is not None:
        return "its forward was replaced (a cache or offload hook)"
    if block._forward_hooks or block._forward_pre_hooks:
        return "it has forward hooks"
    attn = block._modules["attn"]
    if attn is None:
        return "it has no attention"
    processor = type(attn.processor).__name__
    if processor not in _PLAIN_PROCESSORS:
        return f"its attention processor is {processor}"
    if getattr(attn, "fused_projections", False):
        return "its projections are fused by diffusers (call unfuse_qkv_projections())"
    for name, part in block._modules.items():
        if part is not None and (found := find_hooked(part, name)):
            return f"its {found} has hooks or another forward"
    return None


def _double(block: nn.Module) -> DoubleOverride:
    def run(img: Tensor, txt: Tensor, vec: Tensor, pe: Pe) -> tuple[Tensor, Tensor]:
        txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=_interleaved(pe))
        return img, txt

    return run


def _single(block: nn.Module) -> SingleOverride:
    def run(x: Tensor, vec: Tensor, pe: Pe, txt_tokens: int) -> Tensor:
        txt, img = block(
            hidden_states=x[:, txt_tokens:], encoder_hidden_states=x[:, :txt_tokens], temb=vec,
            image_rotary_emb=_interleaved(pe),
        )  # fmt: skip
        return torch.cat((txt, img), dim=1)

    return run


def _interleaved(pe: Pe) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, head_dim], each angle twice, as diffusers' `apply_rotary_emb` wants them."""
    return pe.cos.repeat_interleave(2, dim=-1), pe.sin.repeat_interleave(2, dim=-1)
