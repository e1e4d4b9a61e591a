"""A tiny FLUX's weights, and LoRA files for it, written the way the trainers write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trt_core.lora import merged, read_keys

HIDDEN = 16
MLP = 64
HEAD = 8
IN_CHANNELS = 4
TEXT = 12
VECTOR = 10
TIME = 256

LINEARS = {
    "img_in": (HIDDEN, IN_CHANNELS),
    "txt_in": (HIDDEN, TEXT),
    "time_in.in_layer": (HIDDEN, TIME),
    "time_in.out_layer": (HIDDEN, HIDDEN),
    "vector_in.in_layer": (HIDDEN, VECTOR),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "guidance_in.in_layer": (HIDDEN, TIME),
    "guidance_in.out_layer": (HIDDEN, HIDDEN),
    "final_layer.linear": (IN_CHANNELS, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}
DOUBLE = {
    f"{stream}_{layer}": shape
    for stream in ("img", "txt")
    for layer, shape in {
        "mod.lin": (6 * HIDDEN, HIDDEN),
        "attn.qkv": (3 * HIDDEN, HIDDEN),
        "attn.proj": (HIDDEN, HIDDEN),
        "mlp.0": (MLP, HIDDEN),
        "mlp.2": (HIDDEN, MLP),
    }.items()
}
SINGLE = {
    "linear1": (3 * HIDDEN + MLP, HIDDEN),
    "linear2": (HIDDEN, HIDDEN + MLP),
    "modulation.lin": (3 * HIDDEN, HIDDEN),
}
NORMS = (
    "img_attn.norm.query_norm",
    "img_attn.norm.key_norm",
    "txt_attn.norm.query_norm",
    "txt_attn.norm.key_norm",
)


def tiny_shapes(double: int = 2, single: int = 2, guidance: bool = True) -> dict[str, tuple[int, ...]]:
    """BFL weight name -> shape of a FLUX with hidden size 16."""
    linears = {name: shape for name, shape in LINEARS.items() if guidance or not name.startswith("guidance_in")}
    linears |= {f"double_blocks.{i}.{name}": shape for i in range(double) for name, shape in DOUBLE.items()}
    linears |= {f"single_blocks.{i}.{name}": shape for i in range(single) for name, shape in SINGLE.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"double_blocks.{i}.{norm}.scale": (HEAD,) for i in range(double) for norm in NORMS}
    shapes |= {
        f"single_blocks.{i}.norm.{norm}.scale": (HEAD,) for i in range(single) for norm in ("query_norm", "key_norm")
    }
    return shapes


def random_base(shapes: Mapping[str, tuple[int, ...]], seed: int = 7) -> dict[str, Tensor]:
    """fp32 weights for every name of `shapes`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(shape: tuple[int, ...], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """`down` [rank, in] and `up` [out, rank] for a weight of `shape`."""
    return random_tensor(rank, shape[1], seed=seed), random_tensor(shape[0], rank, seed=seed + 1000)


def kohya(module: str, down: Tensor, up: Tensor, alpha: float | None = None) -> dict[str, Tensor]:
    """The keys of one module as kohya and OneTrainer end them: lora_down, lora_up and maybe alpha."""
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return tensors if alpha is None else tensors | {f"{module}.alpha": torch.tensor(float(alpha))}


def peft(module: str, down: Tensor, up: Tensor, adapter: str = "") -> dict[str, Tensor]:
    """The keys of one module as PEFT ends them: lora_A and lora_B, with the adapter's name or without."""
    middle = f".{adapter}" if adapter else ""
    return {f"{module}.lora_A{middle}.weight": down, f"{module}.lora_B{middle}.weight": up}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of `tensors`; returns its path."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(metadata or {}) or None)
    return path


SHAPES = tiny_shapes()
BASE = random_base(SHAPES)
QKV = "double_blocks.0.img_attn.qkv"
PROJ = "double_blocks.0.img_attn.proj"


def flat(module: str) -> str:
    """A module's name as kohya flattens it."""
    return module.replace(".", "_")


def merge(tensors: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """The weights that the file changes, merged into `BASE`."""
    result = dict(BASE)
    for patch in read_keys(tensors, SHAPES).patches:
        result[patch.weight] = merged(result[patch.weight], [(patch, strength)])
    return {name: weight for name, weight in result.items() if weight is not BASE[name]}


def assert_weights(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same weights are changed, each to its expected values."""
    assert seen.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
