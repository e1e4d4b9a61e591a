"""What the patcher that samples does to each block weight, as the library's patches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_patcher
import numpy
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ...trt_core.lora.changes import Change, Difference, LowRank, Patch
from ...trt_core.weights import WeightPatches

ComfyPatch = tuple[float, Any, float, tuple[int, int, int] | None, Callable[[Tensor], Tensor] | None]
"""strength, value, strength of the model, (dimension, start, length) or None, function or None."""
_SAMPLE_BYTES = 256
_LARGEST_FACTOR = 2**23
"""Elements: rank 256 of FLUX's widest layer has half as many, its smallest block weight more."""


@dataclass(frozen=True, slots=True, eq=False)
class ComfyMerge(Change):
    """All that ComfyUI has for one weight, computed by ComfyUI itself: LoHa, DoRA, merged models, whatever comes."""

    key: str
    patches: Sequence[ComfyPatch]

    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        out = comfy.lora.calculate_weight(list(self.patches), weight, self.key, intermediate_dtype=torch.float32)
        if out is not weight:
            weight.copy_(out)


def effective_patches(patcher: Any, names: Mapping[str, str]) -> dict[str, WeightPatches]:
    """BFL name -> patches, for those of `names` (BFL name -> ComfyUI's key) that the patcher changes."""
    return {
        name: _weight_patches(patcher, name, key) for name, key in names.items() if patcher.patches.get(key)
    }  # fmt: skip


def why_resized(patcher: Any, names: Mapping[str, str]) -> str | None:
    """The reason why a block weight's new value cannot be bound: a LoRA gives it another shape."""
    for name, key in names.items():
        if not patcher.patches.get(key):
            continue
        weight = comfy.model_patcher.get_key_weight(patcher.model, key)[0]
        if tuple(comfy.lora.calculate_shape(patcher.patches[key], weight, key)) != tuple(weight.shape):
            return f"a LoRA gives {name} another shape"
    return None


class SameTensor:
    """Equal to another of the same tensor, or of an equal one in host memory.

    A LoRA node that moved in the graph, or whose model was loaded anew, reads its file again: other tensors, the same
    values, and nothing to merge. Two files differ in their first numbers already; equal ones are compared whole (60 ms
    for 300 MB). Weights of a model are not compared.
    """

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __hash__(self) -> int:
        return hash((self._tensor.shape, self._tensor.dtype))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SameTensor):
            return NotImplemented
        mine, theirs = self._tensor, other._tensor
        if mine is theirs:
            return True
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape or not (_comparable(mine) and _comparable(theirs)):
            return False
        if not _same_bytes(mine, theirs):
            return False
        self._tensor = theirs  # the next comparison is one of addresses
        return True


def _comparable(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    return plain and tensor.numel() <= _LARGEST_FACTOR


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Not by torch.equal: its threads take milliseconds for each of 456 factors on a busy machine."""
    first, second = (tensor.flatten().view(torch.uint8).numpy() for tensor in (one, other))
    return numpy.array_equal(first[:_SAMPLE_BYTES], second[:_SAMPLE_BYTES]) and numpy.array_equal(first, second)


def signature(patches: Sequence[ComfyPatch]) -> Hashable:
    """Equal for patches of the same values at the same strengths. Keeps their tensors alive."""
    return tuple(
        (strength, strength_model, offset, None if function is None else id(function), _identity(value))
        for strength, value, strength_model, offset, function in patches
    )


def _weight_patches(patcher: Any, name: str, key: str) -> WeightPatches:
    patches = patcher.patches[key]
    shape = tuple(comfy.model_patcher.get_key_weight(patcher.model, key)[0].shape)
    plain = [_plain(name, shape, patch) for patch in patches]
    if any(patch is None for patch in plain):
        plain = [(Patch(name, None, ComfyMerge(key, tuple(patches))), 1.0)]
    return WeightPatches(signature(patches), tuple(plain))


def _plain(name: str, shape: tuple[int, ...], patch: ComfyPatch) -> tuple[Patch, float] | None:
    """A low-rank product or a difference on whole rows, which the library merges in one pass; None for all else.

    The same operations in the same order as ComfyUI's own, so the same bits where ComfyUI merges in fp32.
    """
    strength, value, strength_model, offset, function = patch
    if strength_model != 1.0 or function is not None or (offset is not None and offset[0] != 0):
        return None
    rows = None if offset is None else (offset[1], offset[1] + offset[2])
    target = shape if rows is None else (offset[2], *shape[1:])
    change = _low_rank(value, target) or _difference(value, target)
    return None if change is None else (Patch(name, rows, change), strength)


def _low_rank(value: Any, target: tuple[int, ...]) -> LowRank | None:
    if type(value) is not LoRAAdapter:
        return None
    up, down, alpha, mid, dora, reshape = value.weights
    if mid is not None or dora is not None or reshape is not None or up.ndim != 2 or down.ndim != 2:
        return None
    if (up.shape[0], down.shape[1]) != target or up.shape[1] != down.shape[0]:
        return None  # ComfyUI logs this and leaves the weight as it is
    return LowRank(down, up, 1.0 if alpha is None else alpha / down.shape[0])


def _difference(value: Any, target: tuple[int, ...]) -> Difference | None:
    if not isinstance(value, tuple) or len(value) not in (1, 2) or (len(value) == 2 and value[0] != "diff"):
        return None
    tensors = value[-1] if len(value) == 2 else value
    fits = len(tensors) == 1 and isinstance(tensors[0], Tensor) and tuple(tensors[0].shape) == target
    return Difference(tensors[0]) if fits else None


def _identity(value: Any) -> Hashable:
    if isinstance(value, WeightAdapterBase):
        return (value.name, _identity(value.weights))
    if isinstance(value, list | tuple):
        return tuple(_identity(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _identity(item)) for name, item in value.items())
    if isinstance(value, Tensor):
        return SameTensor(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # Bound methods (a merged model's convert_weight) are new objects at each access.
    return getattr(value, "__qualname__", None) if callable(value) else id(value)
