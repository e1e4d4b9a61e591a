"""Real-shaped FP8 models on the GPU, their adapters, and what they have bound: for several files of tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.diffusers_pair import lora
from tests.unit.fp8_simulation import (
    Scheme,
    compiled_fp8,
    fused_layers,
)
from tests.unit.tiny_flux import tiny_transformer

from .conftest import real_shaped_model

BACKENDS = pytest.mark.parametrize("backend", ["eager", "inductor"])
PLACES = pytest.mark.parametrize("place", ["gpu", "host"])
TARGETS = ("to_q", "to_k", "add_v_proj", "ff.net.2", "proj_mlp", "norm.linear", "norm1.linear")


def real_shaped(adversarial: bool = False, **sizes: int) -> Any:
    wanted = {"heads": 2, "head_dim": 128, "double": 1, "single": 2, **sizes}
    return tiny_transformer(**wanted, adversarial=adversarial).to("cuda", torch.bfloat16)


def fp8(cache: Any, place: str = "gpu", **options: Any) -> Any:
    return compiled_fp8(real_shaped_model(), Scheme(), cache, base_weights=place, **options)


def add(model: Any, name: str, *targets: str, seed: int = 11) -> None:
    """The same adapter for the same seed, wherever the base lies."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.add_adapter(lora(*targets), adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in model.named_parameters():
            if "lora_" in path and f".{name}." in path:
                values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
                parameter.data = values.to(parameter.device, parameter.dtype)


def matrices(model: Any) -> list[Tensor]:
    return [layer.weight for layers in fused_layers(model).values() for layer in layers]


def bound(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model._trt_state.module.weights.tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n].float(), other[n].float()) for n in one)
