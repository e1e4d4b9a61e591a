"""How much of a LoRA an FP8 model applies, against the same LoRA on the same weights in fp32."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tests.unit.diffusers_pair import lora
from tests.unit.fp8_simulation import BLOCK_LINEARS, dequantized, fused_layers, fused_modules, layer_inputs
from tests.unit.tiny_flux import exact_inputs, run_diffusers


def train_(model: FluxTransformer2DModel, size: float, inputs: Mapping[str, Tensor], seed: int) -> None:
    """Factors as training leaves them, `down` made of what goes into the layer; delta's rms is `size` of the weight's.

    With a random `down`, a layer 256 wide would hide such a small change in the rounding of its inputs; one 3072 wide
    would not.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layers in fused_modules(model).items():
        seen = inputs[name]
        for layer in layers:
            rank, out = layer.lora_A["a"].weight.shape[0], layer.lora_B["a"].weight.shape[0]
            down = torch.randn(rank, len(seen), generator=generator).to(seen.device) @ seen
            up = torch.randn(out, rank, generator=generator).to(seen.device)
            rms = layer.base_layer.weight.float().square().mean().sqrt()
            up *= size * rms / (up @ down * layer.scaling["a"]).square().mean().sqrt()
            for factor, value in ((layer.lora_A["a"], down), (layer.lora_B["a"], up)):
                # A new tensor, because what is written through `.data` shows in no version counter.
                factor.weight.data = value.to(factor.weight.dtype).to(factor.weight.device)


def lora_gain(
    model: FluxTransformer2DModel, exact: FluxTransformer2DModel, calls: Sequence[Mapping[str, Any]], size: float,
    loras: int,
) -> float:  # fmt: skip
    """<y - y0, r - r0> / ||r - r0||^2 over some calls and LoRAs: y is the FP8 `model`, r `exact`, diffusers' own in
    fp32."""
    exact_calls = [exact_inputs(call) for call in calls]
    inputs = layer_inputs(exact, exact_calls)
    before = [run_diffusers(model, call).float() for call in calls]
    reference = [run_diffusers(exact, call) for call in exact_calls]
    for one in (model, exact):
        one.add_adapter(lora(*BLOCK_LINEARS), adapter_name="a")
    product = square = 0.0
    for seed in range(loras):
        train_(model, size, inputs, seed)
        factors = {name: tensor.float() for name, tensor in model.state_dict().items() if "lora_" in name}
        exact.load_state_dict(factors, strict=False)
        for index, call in enumerate(calls):
            change = run_diffusers(exact, exact_calls[index]) - reference[index]
            product += float(((run_diffusers(model, call).float() - before[index]) * change).sum())
            square += float(change.square().sum())
    return product / square


def rounded_bases(model: FluxTransformer2DModel, per_row: bool) -> FluxTransformer2DModel:
    """A copy whose weights are FP8 numbers already, as after a loader that quantizes first."""
    copied = copy.deepcopy(model)
    for name, layers in fused_layers(copied).items():
        fused = dequantized(name, torch.cat([layer.weight.detach().float() for layer in layers]), per_row)
        for layer, rows in zip(layers, fused.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = rows.to(layer.weight.dtype).clone()
    return copied
