"""Conditioning without text encoders, latents without a VAE: everything random, everything from a seed."""

from __future__ import annotations

from typing import Any

import node_helpers
import torch
from comfy_api.latest import io

CATEGORY = "tests"


def randn(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def seed_input(name: str = "seed") -> io.Int.Input:
    return io.Int.Input(name, default=0, min=0, max=2**31)


class Conditioning(io.ComfyNode):
    """What FLUX's two text encoders would give. `nonce` changes nothing but makes the sampler run again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Conditioning",
            category=CATEGORY,
            inputs=[
                seed_input(),
                io.Int.Input("tokens", default=32, min=1, max=4096),
                io.Int.Input("batch", default=1, min=1, max=16),
                io.Float.Input("guidance", default=3.5, min=0.0, max=100.0),
                io.Combo.Input("guidance_mode", options=["value", "default", "none"], default="value"),
                seed_input("nonce"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, seed: int, tokens: int, batch: int, guidance: float, guidance_mode: str, nonce: int
    ) -> io.NodeOutput:
        facts: dict[str, Any] = {"pooled_output": randn(seed + 1, batch, 768)}
        if guidance_mode != "default":
            facts["guidance"] = guidance if guidance_mode == "value" else None
        return io.NodeOutput([[randn(seed, batch, tokens, 4096), facts]])


class RandomLatent(io.ComfyNode):
    """Like an encoded picture of that size: a start for image to image, or a Kontext reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_RandomLatent",
            category=CATEGORY,
            inputs=[
                seed_input(),
                io.Int.Input("width", default=256, min=16, max=4096, step=8),
                io.Int.Input("height", default=256, min=16, max=4096, step=8),
                io.Int.Input("batch", default=1, min=1, max=16),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, seed: int, width: int, height: int, batch: int) -> io.NodeOutput:
        return io.NodeOutput({"samples": randn(seed, batch, 16, height // 8, width // 8)})


class Mask(io.ComfyNode):
    """A bias on attention between text and image, as Redux's "attn_bias" leaves it in the conditioning.

    The first `tokens` text tokens get `bias` towards every image token, and back. The mask is made for an
    image of one token, so that ComfyUI scales it to the real size.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_AttentionMask",
            category=CATEGORY,
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.Int.Input("tokens", default=8, min=1, max=4096),
                io.Float.Input("bias", default=-2.0, min=-100.0, max=100.0),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: list, tokens: int, bias: float) -> io.NodeOutput:
        n_txt = conditioning[0][0].shape[1]
        mask = torch.zeros(1, n_txt + 1, n_txt + 1, dtype=torch.float16)
        mask[:, :tokens, n_txt:] = bias
        mask[:, n_txt:, :tokens] = bias
        facts = {"attention_mask": mask, "attention_mask_img_shape": (1, 1)}
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, facts))


class Fill(io.ComfyNode):
    """What InpaintModelConditioning gives FLUX Fill: the masked picture's latent, a mask of its left half."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_FillConditioning",
            category=CATEGORY,
            inputs=[io.Conditioning.Input("conditioning"), io.Latent.Input("latent")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: list, latent: dict[str, torch.Tensor]) -> io.NodeOutput:
        height, width = (8 * side for side in latent["samples"].shape[-2:])
        mask = torch.zeros(1, 1, height, width)
        mask[..., : width // 2] = 1
        facts = {"concat_latent_image": latent["samples"], "concat_mask": mask}
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, facts))
