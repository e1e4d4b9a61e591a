"""FLUX.1-dev at full size with random weights, made on the GPU in under a second, and inputs for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

FULL_SIZE = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2",
    "norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp", "proj_out",
)  # fmt: skip
"""Every linear layer of every block, modulations included: 304 matrices in Black Forest Labs' layout."""
SEED = 1
_BRANCH_ENDS = ("to_out.0.weight", "to_add_out.weight", "net.2.weight", "proj_out.weight")


def full_size_transformer(device: torch.device, branch_gain: float = 0.2, **changes: Any) -> nn.Module:
    """FluxTransformer2DModel in bf16 on the GPU, weights random; `branch_gain` as `fill` has it."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**{**FULL_SIZE, **changes}).eval()
    model = model.to(torch.bfloat16).to_empty(device=device)
    fill(model, adversarial=False, branch_gain=branch_gain)
    return model.requires_grad_(False)


@torch.no_grad()
def fill(model: Any, adversarial: bool, branch_gain: float = 0.2) -> None:
    """Writes random weights in place, the same for the same GPU and architecture, wherever they lie.

    Adversarial ones show what plain Gaussians hide: q/k gains of 3 (a sharp softmax), eight output channels 30 times
    larger than the rest in every residual branch, and large gates. `branch_gain` scales the last matrix of each
    residual branch: the smaller, the less the 57 blocks amplify a rounding.
    """
    # Where the model computes: an FP8 model's bases may lie in host memory, whose generator makes other numbers, in
    # minutes.
    device = model.x_embedder.weight.device
    for index, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(device).manual_seed(SEED * 100003 + index)
        values = parameter if parameter.device == device else torch.empty_like(parameter, device=device)
        _fill_one(name, values, generator, adversarial, branch_gain)
        if values is not parameter:
            parameter.copy_(values)


def _fill_one(name: str, values: Tensor, generator: torch.Generator, adversarial: bool, branch_gain: float) -> None:
    # Residual branches at a fifth: 57 blocks at full strength amplify one rounding to half of the output, which would
    # leave nothing to compare.
    branch_end = name.endswith(_BRANCH_ENDS) and "blocks" in name
    gain = branch_gain if branch_end else 1.0
    values.normal_(0.0, gain * values.shape[1] ** -0.5 if values.ndim > 1 else 0.1, generator=generator)
    if "norm_q" in name or "norm_k" in name or "norm_added" in name:
        values.mul_(2.0).add_(3.0 if adversarial else 1.0)
    if adversarial and branch_end:
        values[:8].mul_(30.0)
    if adversarial and name.endswith((".linear.bias",)):
        values.mul_(10.0)


def inputs(model: nn.Module, batch: int, height_px: int, width_px: int, text_tokens: int) -> dict[str, Tensor]:
    """Keyword arguments of one denoising step, the same for the same GPU."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).to(dtype)

    rows, columns = height_px // 16, width_px // 16
    img_ids = torch.zeros(rows, columns, 3, device=device)
    img_ids[..., 1] += torch.arange(rows, device=device)[:, None]
    img_ids[..., 2] += torch.arange(columns, device=device)[None, :]
    config = model.config
    return {
        "hidden_states": normal(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": normal(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": normal(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        # 4, not 3.5: a host's bf16 makes 3504 of 3500, another embedding altogether, and that error hides all others.
        "guidance": torch.full((batch,), 4.0, device=device, dtype=dtype),
        "img_ids": img_ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text_tokens, 3, device=device),
    }


def add_loras(model: Any, rank: int, names: tuple[str, ...] = ("a", "b"), size: float | None = None) -> int:
    """Adds random LoRAs on every block linear and returns how many layers they have.

    Each changes a weight by about 1 % of 1/sqrt(inputs), or with `size` by exactly that part of the weight's own rms.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    device = model.x_embedder.weight.device
    for name in names:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGET_PATTERN, init_lora_weights=False)
        # PEFT makes factors on the current device, with random numbers that are not used: seconds on a CPU.
        with device if device.type == "cuda" else nullcontext():
            model.add_adapter(config, adapter_name=name)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for offset, name in enumerate(names):
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                generator = torch.Generator(down.device).manual_seed(index * 10 + offset)
                down.normal_(0.0, down.shape[1] ** -0.5, generator=generator)
                up.normal_(0.0, 0.01 * rank**-0.5, generator=generator)
                if size is not None:
                    up.mul_(size * _rms(layer.base_layer.weight) / (layer.scaling[name] * _rms_of_product(up, down)))
    return len(layers)


def _rms(matrix: Tensor) -> float:
    return float(matrix.float().square().mean().sqrt())


def _rms_of_product(up: Tensor, down: Tensor) -> float:
    """rms of up @ down from two small matrices: ||up @ down||^2 is the trace of (up' up) (down down')."""
    up, down = up.float(), down.float()
    square = ((up.T @ up) * (down @ down.T)).sum()
    return float((square / (up.shape[0] * down.shape[1])).sqrt())


_TARGET_PATTERN = (
    r"(single_)?transformer_blocks\.\d+\..*(" + "|".join(t.replace(".", r"\.") for t in LORA_TARGETS) + ")"
)
