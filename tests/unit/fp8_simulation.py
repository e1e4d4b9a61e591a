"""FP8 as a simulation in fp32 through diffusers' own modules, written from the recipe's definition alone.

Weights become what E4M3 and their scales can hold, modulations what integers of eight bits can; the inputs of all other
layers are rounded to E4M3 just before the product. Nothing of this package computes here, so that its segments have
something independent to equal.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tests.unit.tiny_flux import exact_inputs, run_diffusers
from trt_core import compile_transformer
from trt_core.fp8_recipe import Activations, Fp8Config, Fp8Recipe, Granularity, attach_recipe, plan_recipe
from trt_core.host import Silent
from trt_core.quantize import flux_architecture

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK_LINEARS = [
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out", "ff.net.0.proj",
    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear", "norm.linear",
    "proj_mlp", "single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.proj_out",
]  # fmt: skip
"""LoRA targets: every linear layer in the blocks of a model with two single ones, and none around them."""
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}  # fmt: skip


def fused_modules(model: FluxTransformer2DModel) -> dict[str, list[nn.Module]]:
    """BFL's name of each linear layer in the blocks -> diffusers' layers whose rows it holds, in their order, or PEFT's
    layers around them."""
    found: dict[str, list[nn.Module]] = {}
    for kind, blocks, table in (
        ("double_blocks", model.transformer_blocks, _DOUBLE),
        ("single_blocks", model.single_transformer_blocks, _SINGLE),
    ):
        for index, block in enumerate(blocks):
            for name, parts in table.items():
                found[f"{kind}.{index}.{name}"] = [block.get_submodule(part) for part in parts]
    return found


def fused_layers(model: FluxTransformer2DModel) -> dict[str, list[nn.Linear]]:
    """The same without adapters."""
    return {
        name: [getattr(layer, "base_layer", layer) for layer in layers] for name, layers in fused_modules(model).items()
    }


def layer_inputs(
    model: FluxTransformer2DModel, calls: Iterable[Mapping[str, Any]], which: int = 0
) -> dict[str, Tensor]:
    """Everything that went into each layer over some calls, [rows, in], seen at one of diffusers' layers for it."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, layers in fused_layers(model).items():

        def note(layer: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].detach().flatten(0, -2))

        handles.append(layers[which].register_forward_pre_hook(note))
    for call in calls:
        run_diffusers(model, call)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def largest_inputs(model: FluxTransformer2DModel, calls: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The largest absolute input of every layer over some calls."""
    return {name: float(x.abs().max()) for name, x in layer_inputs(model, calls).items()}


def round_fp8(merged: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """E4M3 and fp32 scales, [rows, 1] or [1], of an fp32 matrix."""
    amax = merged.abs().amax(1, keepdim=True) if per_row else merged.abs().amax().reshape(1)
    scale = amax / LARGEST
    return (merged / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def is_modulation(name: str) -> bool:
    return name.removesuffix(".weight").endswith(("_mod.lin", "modulation.lin"))


def round_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and fp32 scales [rows, groups of 128 columns] of an fp32 matrix; one scale a row of another width."""
    _rows, width = matrix.shape
    parts = matrix.split(128, 1) if width % 128 == 0 else [matrix]
    scales = torch.cat([part.abs().amax(1, keepdim=True) / 127 for part in parts], 1)
    rounded = [(part / scales[:, i : i + 1]).round() for i, part in enumerate(parts)]
    return torch.cat(rounded, 1).to(torch.int8), scales


def round_weight(name: str, matrix: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """What the layer's bound matrix and its scales are for this fp32 matrix."""
    return round_int8(matrix) if is_modulation(name) else round_fp8(matrix, per_row)


def dequantized(name: str, matrix: Tensor, per_row: bool) -> Tensor:
    return widened(*round_weight(name, matrix, per_row))


def widened(q: Tensor, scale: Tensor) -> Tensor:
    """What a bound matrix and its scales stand for, in fp32."""
    return q.float() * (scale if scale.ndim == 1 else scale.repeat_interleave(q.shape[1] // scale.shape[1], 1))


@dataclass(frozen=True)
class Scheme:
    """What runs in FP8 and how; `excluded` are BFL names, `input_amax` None means a scale for each token."""

    per_row: bool = True
    input_amax: Mapping[str, float] | None = None
    excluded: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    headroom: float = 2.0
    quantized_modulations: bool = field(default=True)

    def recipe(self, model: FluxTransformer2DModel) -> Fp8Recipe:
        config = Fp8Config(
            Granularity.ROW if self.per_row else Granularity.TENSOR,
            Activations.DYNAMIC if self.input_amax is None else Activations.STATIC,
            self.patterns,
            self.headroom,
        )
        return plan_recipe(flux_architecture(model), config, self.input_amax)

    def input_scale(self, name: str, x: Tensor) -> Tensor:
        if self.input_amax is None:
            return x.abs().amax(-1, keepdim=True) / LARGEST
        return torch.tensor(self.input_amax[name] * self.headroom / LARGEST, device=x.device)


def simulation(
    model: FluxTransformer2DModel, scheme: Scheme, base: FluxTransformer2DModel | None = None
) -> FluxTransformer2DModel:
    """An fp32 copy of the model whose block layers compute what FP8 can hold of weights and inputs.

    `base`: the same model without its LoRAs, which are then beside the rounded weights of modulations, not in them.
    """
    copied = copy.deepcopy(model).float()
    bases = fused_layers(copied if base is None else base)
    for name, layers in fused_layers(copied).items():
        if name in scheme.excluded:
            continue
        modulation = is_modulation(name)
        if modulation and not scheme.quantized_modulations:
            continue
        whole = torch.cat([layer.weight.detach() for layer in layers])
        rounded = torch.cat([layer.weight.detach().float() for layer in bases[name]]) if modulation else whole
        fused = dequantized(name, rounded, scheme.per_row) + (whole - rounded)
        for layer, rows in zip(layers, fused.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = rows.clone()
            if not modulation:
                _round_inputs(layer, name, scheme)
    return copied


def _round_inputs(layer: nn.Linear, name: str, scheme: Scheme) -> None:
    def forward(x: Tensor) -> Tensor:
        scale = scheme.input_scale(name, x)
        rounded = (x / scale).clamp(-LARGEST, LARGEST).to(E4M3).float() * scale
        return F.linear(rounded, layer.weight, layer.bias)

    layer.forward = forward  # type: ignore[method-assign]


def compiled_fp8(model: FluxTransformer2DModel, scheme: Scheme, cache: Any, **options: Any) -> FluxTransformer2DModel:
    """The model itself, compiled in FP8."""
    attach_recipe(model, scheme.recipe(model))
    options = {"backend": "eager", "cache_folder": str(cache), "progress": Silent(), **options}
    return compile_transformer(model, **options)  # type: ignore[return-value]


@dataclass(frozen=True)
class Outputs:
    """One call, three ways: fp32, the simulation in fp32, and ours."""

    exact: Tensor
    simulated: Tensor
    ours: Tensor


def three_ways(
    ours: FluxTransformer2DModel, plain: FluxTransformer2DModel, scheme: Scheme, inputs: Mapping[str, Any]
) -> Outputs:
    """`ours` is compiled; `plain` has the same weights and its dtype. The other two compute in fp32."""
    exact = exact_inputs(inputs)
    return Outputs(
        run_diffusers(copy.deepcopy(plain).float(), exact),
        run_diffusers(simulation(plain, scheme), exact),
        run_diffusers(ours, inputs).float(),
    )
