"""A tiny FLUX's FP8 weights, bound by themselves or by a compiled diffusers model, and what they should hold."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftConfig
from torch import Tensor, nn

from tests.unit.bound_weights import DOUBLE_NAMES, SINGLE_NAMES, base_weights, copied, random_lora
from tests.unit.fp8_simulation import Scheme, compiled_fp8, fused_modules, is_modulation, round_weight
from tests.unit.tiny_flux import call_inputs, run_diffusers, shapes_of, tiny_transformer
from trt_core.config import BaseWeights
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import Activations, Fp8Config, Fp8Recipe, Granularity, block_linears, plan_recipe
from trt_core.fp8_weights import Fp8Weights, base_place

GRANULARITIES = pytest.mark.parametrize("per_row", [True, False], ids=["row", "tensor"])
CPU = torch.device("cpu")
ARCH = FluxArchitecture.from_shapes(shapes_of(base_weights()))
NAMES = (*DOUBLE_NAMES, *SINGLE_NAMES)
QKV, MODULATION, LAST = DOUBLE_NAMES[0], SINGLE_NAMES[2], "single_blocks.1.modulation.lin.weight"
BIAS = "double_blocks.0.img_attn.proj.bias"
A = random_lora("a", DOUBLE_NAMES, 4, seed=1)
B = random_lora("b", (*DOUBLE_NAMES[:2], *SINGLE_NAMES[:2]), 8, seed=2)
C = random_lora("c", NAMES, 2, seed=3)


def recipe(per_row: bool = True, *exclude: str, static: bool = False) -> Fp8Recipe:
    kinds = (Granularity.ROW if per_row else Granularity.TENSOR, Activations.STATIC if static else Activations.DYNAMIC)
    amax = {name: 1.0 + i for i, name in enumerate(block_linears(ARCH))} if static else None
    return plan_recipe(ARCH, Fp8Config(*kinds, exclude), amax)


def bound(per_row: bool = True, *exclude: str, dtype: torch.dtype = torch.bfloat16, static: bool = False) -> Fp8Weights:
    chosen = recipe(per_row, *exclude, static=static)
    place = base_place(BaseWeights.AUTO, ARCH, chosen, CPU, given_there=True)
    return Fp8Weights(base_weights(dtype).items(), chosen, place, CPU)


def scale_of(name: str) -> str:
    return name.removesuffix("weight") + "weight_scale"


# -- of a compiled model ---------------------------------------------------------------------------------------------


def fp8_model(cache: Path, per_row: bool = True, **options: Any) -> FluxTransformer2DModel:
    model = tiny_transformer().to(options.pop("dtype", torch.bfloat16))
    return compiled_fp8(model, Scheme(per_row), cache, **options)


def add(model: FluxTransformer2DModel, name: str, config: PeftConfig, seed: int = 11) -> None:
    """The same adapter for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(copy.deepcopy(config), adapter_name=name)


def output(model: FluxTransformer2DModel) -> Tensor:
    return run_diffusers(model, call_inputs(model))


def bound_tensors(model: Any) -> dict[str, Tensor]:
    """All that a call reads, with what is added to each modulation under its name + ".beside"."""
    return copied(model._trt_state.module.weights)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n].float(), other[n].float()) for n in one)


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    found = {name for name in one if not torch.equal(one[name].float(), other[name].float())}
    return {name.removesuffix(".weight_scale").removesuffix(".weight").removesuffix(".beside") for name in found}


def merged(layer: nn.Module, adapters: dict[str, float]) -> Tensor:
    """fp32: the base plus strength * alpha / r * (B @ A) of one adapter after another, written out."""
    weight = getattr(layer, "base_layer", layer).weight.detach().float()
    for name, strength in adapters.items():
        if name in getattr(layer, "lora_A", {}):
            delta = layer.lora_B[name].weight.detach().float() @ layer.lora_A[name].weight.detach().float()
            weight = weight + delta * (strength * layer.lora_alpha[name] / layer.r[name])
    return weight


def is_merged(model: FluxTransformer2DModel, adapters: dict[str, float], per_row: bool) -> bool:
    """Whether every bound weight is its base plus these adapters, rounded once with a fresh scale, bit for bit, and
    every modulation its base, with the adapters beside it."""
    tensors = bound_tensors(model)
    for name, layers in fused_modules(model).items():
        whole = torch.cat([merged(layer, adapters) for layer in layers])
        if is_modulation(name):
            base = torch.cat([merged(layer, {}) for layer in layers])
            if not torch.allclose(tensors[f"{name}.beside"], whole - base, rtol=0.02, atol=1e-6):
                return False
            whole = base
        q, scale = round_weight(name, whole, per_row)
        seen = tensors[f"{name}.weight"]
        if seen.dtype is not q.dtype or not torch.equal(seen.float(), q.float()):
            return False
        if not torch.equal(tensors[f"{name}.weight_scale"], scale):
            return False
    return True
