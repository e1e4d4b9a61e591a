"""A guess at the model a LoRA was made for, from keys that mean nothing in this one."""

from __future__ import annotations

import re
from collections.abc import Collection

_SIGNS: tuple[tuple[str, str], ...] = (
    (
        "SDXL",
        r"lora_te2_text_model_encoder_layers_|text_encoder_2\.text_model|transformer_blocks_[2-9]_attn1_",
    ),
    (
        "Stable Diffusion 1.5 or SDXL",
        r"(?:^|[._])(?:input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)[._]",
    ),
    ("Stable Diffusion 3", r"joint_blocks[._]|context_block[._]"),
    (
        "FLUX.2",
        r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj"
        r"|single_transformer_blocks[._]\d+[._]attn[._]to_out|ff(?:_context)?[._]linear_(?:in|out)",
    ),
    ("Chroma", r"distilled_guidance_layer"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp[._]net|mod[._]1)"),
    (
        "HunyuanVideo",
        r"\.(?:img|txt)_attn_(?:qkv|proj)|individual_token_refiner|txt_in[._](?:individual|t_embedder|c_emb)",
    ),
    ("Wan", r"(?:^|[._])blocks[._]\d+[._](?:cross_attn|self_attn|ffn)"),
    ("LTX-Video or PixArt", r"transformer_blocks[._]\d+[._]attn[12][._]|caption_projection"),
    (
        "Z-Image or Lumina 2",
        r"(?:^|[._])(?:context_refiner|noise_refiner)[._]|(?:^|[._])layers[._]\d+[._]attention",
    ),
)


def likely_model(keys: Collection[str], all_keys: Collection[str]) -> str:
    """The name of the model that the unknown `keys` point to, or "" where nothing is known about them.

    `all_keys` is the whole file: SDXL is told from Stable Diffusion 1.5 by its second text encoder.
    """
    if any(re.search(_SIGNS[1][1], key) for key in keys):
        return next((name for name, sign in _SIGNS[:2] if any(re.search(sign, key) for key in all_keys)), "")
    return next((name for name, sign in _SIGNS[2:] if any(re.search(sign, key) for key in keys)), "")
