"""One denoising call in bf16 and the same in fp32, and how two outputs compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def call(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    return model(**arguments, return_dict=False)[0]


def exact(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same call in fp32. A host scales times by 1000 in its own dtype: other embeddings altogether, and no error of
    anybody's arithmetic."""
    wide = {name: value.float() for name, value in arguments.items()}
    for name in ("timestep", "guidance"):
        wide[name] = (arguments[name] * 1000).float() / 1000
    return wide


def at(arguments: dict[str, Tensor], latent: Tensor, sigma: float) -> dict[str, Tensor]:
    """The call with another latent, rounded to the call's dtype, at another time."""
    known = arguments["hidden_states"]
    return {**arguments, "hidden_states": latent.to(known), "timestep": torch.full_like(arguments["timestep"], sigma)}


def attention_is_fp8(model: Any) -> bool:
    """Whether attention of the weights that are bound now runs in E4M3: their recipe's simulation rounds it, too."""
    if not hasattr(model, "trt_report"):
        return False
    bound = model._trt_state.module._bound
    allowed = bound is not None and any(precision.fp8_attention for precision in (*bound.double, *bound.single))
    return allowed and "fp8 attention" in str(model.trt_report().segments)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
