"""FLUX files small enough for a CPU: checkpoints that ComfyUI's loader recognises, and LoRAs that fit."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HEAD_WIDTH = 128
"""FLUX.1's attention heads are 128 wide; ComfyUI derives their number from the hidden size."""

FP8_MAX = 448.0
"""Largest float8_e4m3fn."""


@dataclass(frozen=True)
class FluxShape:
    """A FLUX.1 architecture. `in_channels`: 64 (dev, schnell, Kontext), 128 (Canny, Depth), 384 (Fill)."""

    hidden: int = 256
    double_blocks: int = 2
    single_blocks: int = 2
    in_channels: int = 64
    guidance: bool = True

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes by Black Forest Labs' names, as in their own files (`query_norm.scale`)."""
        hidden = self.hidden
        linears = {
            "img_in": (hidden, self.in_channels),
            "txt_in": (hidden, 4096),
            "final_layer.linear": (64, hidden),
            "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
        }
        embedders = {"time_in": 256, "vector_in": 768, **({"guidance_in": 256} if self.guidance else {})}
        for name, width in embedders.items():
            linears |= {f"{name}.in_layer": (hidden, width), f"{name}.out_layer": (hidden, hidden)}
        linears |= self.block_linears()
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in linears.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes | dict.fromkeys(self._norms(), (HEAD_WIDTH,))

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """`[out, in]` of every linear layer in a block: what LoRAs change."""
        hidden, linears = self.hidden, {}
        for i in range(self.double_blocks):
            for stream in ("img", "txt"):
                block = f"double_blocks.{i}.{stream}"
                linears |= {
                    f"{block}_mod.lin": (6 * hidden, hidden),
                    f"{block}_attn.qkv": (3 * hidden, hidden),
                    f"{block}_attn.proj": (hidden, hidden),
                    f"{block}_mlp.0": (4 * hidden, hidden),
                    f"{block}_mlp.2": (hidden, 4 * hidden),
                }
        for i in range(self.single_blocks):
            block = f"single_blocks.{i}"
            linears |= {
                f"{block}.modulation.lin": (3 * hidden, hidden),
                f"{block}.linear1": (7 * hidden, hidden),
                f"{block}.linear2": (hidden, 5 * hidden),
            }
        return linears

    def _norms(self) -> list[str]:
        places = [f"double_blocks.{i}.{stream}_attn" for i in range(self.double_blocks) for stream in ("img", "txt")]
        places += [f"single_blocks.{i}" for i in range(self.single_blocks)]
        return [f"{place}.norm.{which}_norm.scale" for place in places for which in ("query", "key")]


def flux_weights(shape: FluxShape, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights that keep activations near 1, so that every block and every gate changes the output."""
    return {name: _random(name, size, seed).to(dtype) for name, size in shape.weights().items()}


def write_flux(path: Path, shape: FluxShape, seed: int = 0, *, prefix: str = "") -> Path:
    """A bf16 checkpoint. `prefix`: "" as in BFL's files, "model.diffusion_model." as in all-in-one files."""
    return _write(path, {prefix + name: weight for name, weight in flux_weights(shape, seed).items()})


def write_flux_fp8_scaled(path: Path, shape: FluxShape, seed: int = 0) -> Path:
    """The same, block linears in ComfyUI's scaled float8: one fp32 scale per layer, named in the header."""
    weights = flux_weights(shape, seed)
    for layer in shape.block_linears():
        weight = weights[f"{layer}.weight"].float()
        scale = weight.abs().max() / FP8_MAX
        weights[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{layer}.weight_scale"] = scale
    layers = {layer: {"format": "float8_e4m3fn"} for layer in shape.block_linears()}
    return _write(path, weights, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})})


def write_lora_kohya(path: Path, shape: FluxShape, seed: int, *, rank: int = 4, only: str = "") -> Path:
    """A LoRA in kohya's naming, alpha = rank / 2, on block linears whose BFL name matches regex `only`."""
    tensors: dict[str, Tensor] = {}
    for layer, (out_width, in_width) in shape.block_linears().items():
        if re.search(only, layer):
            name = "lora_unet_" + layer.replace(".", "_")
            down, up = _factors(name, out_width, in_width, rank, seed)
            alpha = torch.tensor(rank / 2.0)
            tensors |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": alpha,
            }
    return _write(path, tensors, {"ss_network_dim": str(rank)})


def write_lora_diffusers(path: Path, shape: FluxShape, seed: int, *, rank: int = 8, only: str = "") -> Path:
    """A LoRA in diffusers' PEFT naming: q, k and v apart. `only` is a regex on diffusers' names."""
    tensors: dict[str, Tensor] = {}
    for layer, (out_width, in_width) in _diffusers_linears(shape).items():
        if re.search(only, layer):
            down, up = _factors(layer, out_width, in_width, rank, seed)
            tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    return _write(path, tensors)


def write_lora_control(path: Path, shape: FluxShape, seed: int, *, rank: int = 4) -> Path:
    """A Black Forest Labs control LoRA: it widens `img_in` to 128 channels and replaces a norm."""
    tensors: dict[str, Tensor] = {}
    for layer, out_width, in_width in (
        ("img_in", shape.hidden, 128),
        ("double_blocks.0.img_attn.proj",) + (shape.hidden,) * 2,
    ):
        down, up = _factors(layer, out_width, in_width, rank, seed)
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        tensors[f"{layer}.lora_B.bias"] = torch.zeros(out_width)
    tensors["single_blocks.0.norm.key_norm.scale"] = torch.full((HEAD_WIDTH,), 0.9)
    return _write(path, tensors)


def _diffusers_linears(shape: FluxShape) -> dict[str, tuple[int, int]]:
    hidden, linears = shape.hidden, {}
    square, wide, narrow = (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)
    for i in range(shape.double_blocks):
        block = f"transformer_blocks.{i}"
        attention = (
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
        )
        linears |= {f"{block}.attn.{name}": square for name in attention}
        linears |= {f"{block}.ff{text}.net.0.proj": wide for text in ("", "_context")}
        linears |= {f"{block}.ff{text}.net.2": narrow for text in ("", "_context")}
        linears |= {f"{block}.norm1{text}.linear": (6 * hidden, hidden) for text in ("", "_context")}
    for i in range(shape.single_blocks):
        block = f"single_transformer_blocks.{i}"
        linears |= {f"{block}.attn.{name}": square for name in ("to_q", "to_k", "to_v")}
        linears |= {f"{block}.proj_mlp": wide, f"{block}.proj_out": (hidden, 5 * hidden)}
        linears |= {f"{block}.norm.linear": (3 * hidden, hidden)}
    return linears


def _factors(name: str, out_width: int, in_width: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """down `[rank, in]`, up `[out, rank]` in bf16; their product is about a third of a weight's size."""
    generator = _generator(name, seed)
    down = torch.randn(rank, in_width, generator=generator) / in_width**0.5
    up = torch.randn(out_width, rank, generator=generator) * 0.35 / rank**0.5
    return down.bfloat16(), up.bfloat16()


def _random(name: str, size: tuple[int, ...], seed: int) -> Tensor:
    noise = torch.randn(size, generator=_generator(name, seed))
    if name.endswith(".scale"):
        return 1 + 0.1 * noise
    return 0.05 * noise if len(size) == 1 else noise / size[1] ** 0.5


def _generator(name: str, seed: int) -> torch.Generator:
    """By name, so that a weight is the same in every variant of the architecture."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
