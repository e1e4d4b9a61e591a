"""What one tensor of a LoRA file is for, read from the end of its key."""

from __future__ import annotations

import re
from enum import Enum

_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
"""PEFT puts the adapter's name between the factor and `weight`: `lora_A.default.weight`."""


class Role(Enum):
    """The value is the pattern of the key after the module's name and a dot."""

    DOWN = rf"(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|down){_ADAPTER}(?:\.weight)?"
    UP = rf"(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up|up){_ADAPTER}(?:\.weight)?"
    UP_BIAS = rf"(?:lora_B|lora_up){_ADAPTER}\.bias"
    ALPHA = r"alpha"
    MAGNITUDE = rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?"
    DORA_SCALE = r"dora_scale"
    DIFF = r"diff|w_norm"
    DIFF_BIAS = r"diff_b|b_norm"
    NORM = r"(?<=query_norm\.)scale|(?<=key_norm\.)scale|(?<=\.norm_[qk]\.)weight|(?<=\.norm_added_[qk]\.)weight"
    SET_WEIGHT = r"set_weight"
    HADA_W1_A = r"hada_w1_a"
    HADA_W1_B = r"hada_w1_b"
    HADA_W2_A = r"hada_w2_a"
    HADA_W2_B = r"hada_w2_b"
    LOKR_W1 = r"lokr_w1"
    LOKR_W1_A = r"lokr_w1_a"
    LOKR_W1_B = r"lokr_w1_b"
    LOKR_W2 = r"lokr_w2"
    LOKR_W2_A = r"lokr_w2_a"
    LOKR_W2_B = r"lokr_w2_b"
    CONVOLUTION = r"lora_mid\.weight|hada_t1|hada_t2|lokr_t1|lokr_t2"
    RESHAPE = r"reshape_weight"
    OTHER_METHOD = (
        r"oft_\w+(?:\.weight)?|boft_\w+(?:\.weight)?|[abc][12]\.weight|on_input|wd_for_diff|bora_\w+"
        r"|lora_embedding_[AB]|ia3_l|vera_\w+|scalar"
    )


_KEY = re.compile(r"(?P<module>.+?)\.(?:" + "|".join(f"(?P<{role.name}>{role.value})" for role in Role) + r")")

_TEXT_ENCODER = re.compile(
    r"lora_(?:prior_)?te\d?[_.]|text_encoders?[._]|text_encoder_\d[._]|clip_[lgh][._]|t5(?:xxl)?[._]|bundle_emb\."
)


def split_key(key: str) -> tuple[str, Role] | None:
    """The module's name and the role of a key, or None: `a.b.lora_A.weight` -> (`a.b`, DOWN)."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return match["module"], next(role for role in Role if match[role.name] is not None)


def is_text_encoder(key: str) -> bool:
    """Whether a key belongs to CLIP, T5 or an embedding for them, under any trainer's prefix."""
    return _TEXT_ENCODER.match(key) is not None
