"""A tiny FLUX's bf16 weights, random LoRAs for them, and exact comparison of whole sets of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.unit.tiny_flux import bfl_weights, tiny_transformer
from trt_core.config import BaseWeights
from trt_core.lora.changes import Change, LowRank, Patch
from trt_core.weights import BoundWeights, WeightPatches

DOUBLE_NAMES = ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.proj.weight",
                "double_blocks.1.txt_mlp.0.weight", "double_blocks.1.img_mod.lin.weight")  # fmt: skip
SINGLE_NAMES = (
    "single_blocks.0.linear1.weight",
    "single_blocks.1.linear2.weight",
    "single_blocks.1.modulation.lin.weight",
)


@dataclass(frozen=True)
class Lora:
    """Patches by weight name, as one LoRA file has them."""

    title: str
    patches: Mapping[str, Sequence[Patch]]


def base_weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in bfl_weights(tiny_transformer(seed=seed)).items()}


def bound(dtype: torch.dtype = torch.bfloat16) -> BoundWeights:
    return BoundWeights(base_weights(dtype), BaseWeights.AUTO)


def low_rank(
    shape: tuple[int, ...], rank: int, random: torch.Generator, size: float = 0.1, scale: float = 0.5
) -> LowRank:
    """A LoRA whose delta has the standard deviation `size`, scale included."""
    down = torch.randn(rank, shape[1], generator=random)
    up = torch.randn(shape[0], rank, generator=random) * (size / scale * rank**-0.5)
    return LowRank(down.to(torch.bfloat16), up.to(torch.bfloat16), scale)


def random_lora(title: str, names: Iterable[str], rank: int, seed: int) -> Lora:
    """Patches on whole weights, and on the rows of q, k, v or of the MLP where they are fused."""
    random, shapes = torch.Generator().manual_seed(seed), {n: tuple(t.shape) for n, t in base_weights().items()}
    patches: dict[str, list[Patch]] = {}
    for name in names:
        rows, columns = shapes[name]
        third = rows // 3
        parts = [(0, third), (2 * third, rows)] if name.endswith(("qkv.weight", "linear1.weight")) else [None]
        for part in parts:
            size = (rows if part is None else part[1] - part[0], columns)
            patches.setdefault(name, []).append(Patch(name, part, low_rank(size, rank, random)))
    return Lora(title, patches)


def stack(*loras: tuple[Lora, float]) -> dict[str, WeightPatches]:
    """What several LoRAs at their strengths do to every weight."""
    marks: dict[str, list[tuple[str, float]]] = {}
    patches: dict[str, list[tuple[Patch, float]]] = {}
    for lora, strength in loras:
        for name, some in lora.patches.items():
            marks.setdefault(name, []).append((lora.title, strength))
            patches.setdefault(name, []).extend((patch, strength) for patch in some)
    return {name: WeightPatches(tuple(marks[name]), tuple(patches[name])) for name in patches}


def one(name: str, change: Change, strength: float = 1.0, mark: object = "one") -> dict[str, WeightPatches]:
    return {name: WeightPatches(mark, ((Patch(name, None, change), strength),))}


def copied(weights: BoundWeights) -> dict[str, Tensor]:
    """All that a call reads; what is added to the product of a weight that is not merged has its name + ".beside"."""
    return {name: tensor.clone() for name, tensor in weights.tensors.items()} | _beside(weights)


def differing(weights: BoundWeights, expected: Mapping[str, Tensor]) -> list[str]:
    """Names whose bits differ from the expected ones."""
    now = {**weights.tensors, **_beside(weights)}
    return [name for name, tensor in now.items() if not torch.equal(tensor, expected[name])]


def _beside(weights: BoundWeights) -> dict[str, Tensor]:
    found = {}
    for name in weights.tensors:
        layer = name.removesuffix(".weight")
        if not layer.endswith(("_mod.lin", "modulation.lin")) or f"{layer}.weight_scale" not in weights.tensors:
            continue
        delta = None if weights.branches is None else weights.branches.delta(layer)
        found[f"{layer}.beside"] = torch.zeros(weights.tensors[name].shape) if delta is None else delta
    return found


def versions(weights: BoundWeights) -> dict[str, int]:
    """How often each bound tensor was written."""
    return {name: tensor._version for name, tensor in weights.tensors.items()}
