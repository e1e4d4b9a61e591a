"""Tiny real FLUX transformers of diffusers, their weights in BFL's layout, inputs, and the comparison with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from trt_core.backends.check import relative_l2
from trt_core.config import Backend, CompileConfig
from trt_core.extras import Extras
from trt_core.flux.architecture import FluxArchitecture, scaled_axes
from trt_core.mutable_module import MutableTRTModule

FP32_BOUND = 2e-6
"""Largest relative error in fp32; rounding in another order of operations stays three times below it."""
BF16_RATIO_BOUND = 1.5
TEXT_WIDTH, POOLED_WIDTH = 40, 24
OUTLIER_CHANNELS, OUTLIER_GAIN = 8, 40.0
STUDENT_T_FREEDOM = 4


def tiny_transformer(
    *, heads: int = 2, head_dim: int = 32, double: int = 2, single: int = 2, in_channels: int = 64,
    out_channels: int | None = None, guidance: bool = True, adversarial: bool = False, seed: int = 0,
) -> FluxTransformer2DModel:  # fmt: skip
    """An fp32 model in evaluation mode, equal for equal arguments.

    Plain weights are Gaussian with gates, shifts and scales that all matter. Adversarial ones are as trained models are
    at their worst: heavy tails, a few residual channels of forty times the size, q/k norms of gain 3.
    """
    model = FluxTransformer2DModel(
        num_layers=double, num_single_layers=single, attention_head_dim=head_dim, num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=guidance,
        axes_dims_rope=scaled_axes(head_dim), in_channels=in_channels, out_channels=out_channels,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, adversarial, random)
        if adversarial:
            _add_outliers(model)
    return model.eval()


def _fill(name: str, parameter: nn.Parameter, adversarial: bool, random: torch.Generator) -> None:
    normal = torch.randn(parameter.shape, generator=random)
    if parameter.ndim > 1:
        tails = _student_t(parameter.shape, random) if adversarial else normal
        parameter.copy_(tails * parameter.shape[1] ** -0.5)
    elif name.endswith("bias"):
        parameter.copy_(normal * 0.3)
    else:
        parameter.copy_((3.0 if adversarial else 1.0) + 0.2 * normal)


def _student_t(shape: torch.Size, random: torch.Generator) -> Tensor:
    """Heavy tails at unit variance: a normal number over the root of a mean of squares of normal numbers."""
    chi = torch.randn((STUDENT_T_FREEDOM, *shape), generator=random).square().mean(0).sqrt()
    return torch.randn(shape, generator=random) / chi / math.sqrt(STUDENT_T_FREEDOM / (STUDENT_T_FREEDOM - 2))


def _add_outliers(model: FluxTransformer2DModel) -> None:
    for layer in (model.x_embedder, model.context_embedder):
        layer.weight[:OUTLIER_CHANNELS] *= OUTLIER_GAIN


def call_inputs(
    model: FluxTransformer2DModel, *, batch: int = 1, height: int = 5, width: int = 8, text: int = 7, seed: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the model's forward, in the model's dtype; height and width in tokens, not square."""
    random, config, dtype = torch.Generator().manual_seed(seed), model.config, model.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    img_ids = torch.zeros(height, width, 3)
    img_ids[..., 1] += torch.arange(height)[:, None]
    img_ids[..., 2] += torch.arange(width)[None, :]
    inputs = {
        "hidden_states": normal(batch, height * width, config.in_channels),
        "encoder_hidden_states": normal(batch, text, TEXT_WIDTH),
        "pooled_projections": normal(batch, POOLED_WIDTH),
        "timestep": torch.linspace(0.25, 0.875, batch).to(dtype),
        "img_ids": img_ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.linspace(3.5, 1.5, batch).to(dtype)
    return inputs


def exact_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same call in fp32. Timestep and guidance are scaled by 1000 in the model's own dtype, a choice of diffusers
    and ComfyUI whose rounding would hide every error of ours: 3500 becomes 3504 in bf16."""
    exact = {name: _wide(value) for name, value in inputs.items()}
    for name in ("timestep", "guidance"):
        if inputs.get(name) is not None:
            exact[name] = (inputs[name] * 1000).float() / 1000
    return exact


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide(item) for item in value]
    return value.float() if isinstance(value, Tensor) else value


def bfl_weights(model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """Copies of the model's weights in BFL's names and layout, written out here by hand and independent of trt_core."""
    theirs = model.state_dict()
    ours: dict[str, Tensor] = {}

    def linear(name: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            ours[f"{name}.{kind}"] = torch.cat([theirs[f"{source}.{kind}"] for source in sources])

    def norms(name: str, source: str, query: str = "norm_q", key: str = "norm_k") -> None:
        ours[f"{name}.query_norm.scale"] = theirs[f"{source}.{query}.weight"].clone()
        ours[f"{name}.key_norm.scale"] = theirs[f"{source}.{key}.weight"].clone()

    linear("img_in", "x_embedder")
    linear("txt_in", "context_embedder")
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if model.config.guidance_embeds:
        embedders["guidance_in"] = "guidance_embedder"
    for name, source in embedders.items():
        linear(f"{name}.in_layer", f"time_text_embed.{source}.linear_1")
        linear(f"{name}.out_layer", f"time_text_embed.{source}.linear_2")
    linear("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = theirs[f"norm_out.linear.{kind}"].chunk(2)
        ours[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat((shift, scale))
    for index in range(model.config.num_layers):
        name, source = f"double_blocks.{index}", f"transformer_blocks.{index}"
        linear(f"{name}.img_mod.lin", f"{source}.norm1.linear")
        linear(f"{name}.txt_mod.lin", f"{source}.norm1_context.linear")
        linear(f"{name}.img_attn.qkv", *(f"{source}.attn.to_{part}" for part in "qkv"))
        linear(f"{name}.txt_attn.qkv", *(f"{source}.attn.add_{part}_proj" for part in "qkv"))
        norms(f"{name}.img_attn.norm", f"{source}.attn")
        norms(f"{name}.txt_attn.norm", f"{source}.attn", "norm_added_q", "norm_added_k")
        linear(f"{name}.img_attn.proj", f"{source}.attn.to_out.0")
        linear(f"{name}.txt_attn.proj", f"{source}.attn.to_add_out")
        for stream, feed_forward in (("img", "ff"), ("txt", "ff_context")):
            linear(f"{name}.{stream}_mlp.0", f"{source}.{feed_forward}.net.0.proj")
            linear(f"{name}.{stream}_mlp.2", f"{source}.{feed_forward}.net.2")
    for index in range(model.config.num_single_layers):
        name, source = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        linear(f"{name}.modulation.lin", f"{source}.norm.linear")
        linear(f"{name}.linear1", *(f"{source}.attn.to_{part}" for part in "qkv"), f"{source}.proj_mlp")
        norms(f"{name}.norm", f"{source}.attn")
        linear(f"{name}.linear2", f"{source}.proj_out")
    return ours


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def loaded(
    weights: Mapping[str, Tensor], cache: Path, backend: Backend = Backend.EAGER, **options: Any
) -> MutableTRTModule:
    """A module with these BFL weights bound; compiles at its first call."""
    module = MutableTRTModule(
        FluxArchitecture.from_shapes(shapes_of(weights)), CompileConfig(backend, cache_folder=str(cache), **options)
    )
    module.load(weights)
    return module


def run(module: MutableTRTModule, inputs: Mapping[str, Any], extras: Extras | None = None) -> Tensor:
    """The module's output for a diffusers call's arguments."""
    return module(
        inputs["hidden_states"], inputs["encoder_hidden_states"], inputs["timestep"], inputs["pooled_projections"],
        inputs["img_ids"], inputs["txt_ids"], inputs.get("guidance"), extras,
    )  # fmt: skip


@torch.no_grad()
def run_diffusers(model: FluxTransformer2DModel, inputs: Mapping[str, Any], **more: Any) -> Tensor:
    return model(**inputs, **more, return_dict=False)[0]


def fp32_error(model: FluxTransformer2DModel, weights: Mapping[str, Tensor], cache: Path, **sizes: int) -> float:
    """Relative error of our FLUX with `weights` against the diffusers model, both in fp32."""
    inputs = call_inputs(model, **sizes)
    return relative_l2(run(loaded(weights, cache), inputs), run_diffusers(model, inputs))
