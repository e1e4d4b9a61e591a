"""Reads what PEFT's adapter layers would do to their base weights, as patches with a signature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .diffusers_binding import Slot, slots_by_name
from .lora.changes import Change, Difference, Dora, DoraRule, Hadamard, Kronecker, LowRank, Patch
from .weights import WeightPatches

_MERGEABLE_VARIANTS = {"DoraLinearVariant"}

Factors = Mapping[str, Tensor]
"""Adapter name -> its tensor, as PEFT's layers hold them."""


@dataclass(slots=True)
class PeftPatches:
    """Patches by BFL weight name, and why a place cannot be merged (by BFL name), for the block that runs eagerly."""

    weights: dict[str, WeightPatches] = field(default_factory=dict)
    unmergeable: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Reading:
    """What one place's adapters do, and the marks of their tensors by which that was read. It keeps those tensors, so
    that no other tensor can come to lie at the same address."""

    layer: nn.Module
    marks: Hashable
    reason: str | None
    patches: tuple[tuple[Patch, float], ...]


class PeftReader:
    """Reads the adapters of one binding's places before each step; what has not changed is not made anew."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = list(slots)
        self._by_name = slots_by_name(self._slots)
        self._readings: list[_Reading | None] = [None] * len(self._slots)
        self._weights: dict[str, tuple[list[Any], WeightPatches]] = {}
        """By name, of which readings and of which version of the base its patches were made."""

    def read(self) -> PeftPatches:
        """What the active adapters do now. A base weight that was changed in place changes the signature, so that the
        next refit merges it anew; diffusers' methods that change adapters in place release the model before."""
        result, found, marked = PeftPatches(), {}, {}
        for index, slot in enumerate(self._slots):
            layer = slot.module()
            if not _may_change(slot, layer):
                self._readings[index] = None  # which would keep the tensors of adapters that are gone
                continue
            if id(layer) not in marked:  # its weight and its bias are two places
                active = _active(layer)
                marked[id(layer)] = active, _marks(layer, active)
            reading = self._reading(index, slot, layer, *marked[id(layer)])
            if reading.reason:
                result.unmergeable[slot.name] = reading.reason
            elif reading.patches:
                found.setdefault(slot.name, []).append((slot, reading))
        self._weights = {name: self._weight(name, places) for name, places in found.items()}
        result.weights = {name: patches for name, (_, patches) in self._weights.items()}
        return result

    def _reading(
        self, index: int, slot: Slot, layer: nn.Module, active: Sequence[str], marks: Hashable
    ) -> _Reading:  # fmt: skip
        before = self._readings[index]
        # Where nothing is merged no tensor is kept, and another one may come to lie at its address.
        if before is not None and before.layer is layer and before.marks == marks and before.reason is None:
            return before
        reason = why_not_mergeable(layer, active)
        read = _bias_changes if slot.kind == "bias" else _weight_changes
        changes = [] if reason else read(layer, active)
        patches = tuple((Patch(slot.name, slot.rows, change), 1.0) for change in changes)
        reading = self._readings[index] = _Reading(layer, marks, reason, patches)
        return reading

    def _weight(self, name: str, places: list[tuple[Slot, _Reading]]) -> tuple[list[Any], WeightPatches]:
        of: list[Any] = [reading for _, reading in places]
        # Of all parts of a fused matrix: what lies beside a LoRA's rows is merged anew with them.
        of += [base._version for slot in self._by_name[name] if (base := slot.parameter()) is not None]
        before = self._weights.get(name)
        if before is not None and _same(before[0], of):
            return before
        marks = (*((slot.rows, reading.marks) for slot, reading in places), *of[len(places) :])
        return of, WeightPatches(marks, tuple(patch for _, reading in places for patch in reading.patches))


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """The same readings, which are compared as objects, and equal versions."""
    return len(one) == len(other) and all(
        a is b or (type(a) is int and a == b) for a, b in zip(one, other, strict=True)
    )


def _may_change(slot: Slot, layer: nn.Module) -> bool:
    """Whether adapters may do something in this place. Whether a layer can be merged, its weight's place says."""
    if "base_layer" not in layer._modules or not _is_adapted(type(layer)):
        return False
    return slot.kind != "bias" or any((layer.__dict__.get("lora_bias") or {}).values())


@functools.cache
def _is_adapted(kind: type) -> bool:
    """Whether it is a layer of PEFT's around another."""
    return hasattr(kind, "active_adapters")


def why_not_mergeable(layer: nn.Module, active: Sequence[str]) -> str | None:
    """The reason why these adapters of this layer cannot be merged exactly, or None."""
    variants = getattr(layer, "lora_variant", {})
    for adapter in active:
        if adapter in variants and _variant_name(variants[adapter]) not in _MERGEABLE_VARIANTS:
            return (
                f"its adapter {adapter!r} is a {_variant_name(variants[adapter])}, which is not a change of the weight"
            )
        if _reader(type(layer)) is None:
            return f"its adapter {adapter!r} ({_kind(layer)}) is of a kind that is not merged here"
    return None


@functools.cache
def _reader(kind: type) -> Callable[[nn.Module, str], Change | None] | None:
    """What reads an adapter of this kind of layer; None where PEFT itself must run (OFT, IA3, AdaLoRA, ...)."""
    bases = {base.__name__ for base in kind.__mro__}
    if "LoraLayer" in bases and "AdaLoraLayer" not in bases:
        return _lora_change
    if "LoHaLayer" in bases:
        return _loha_change
    return _lokr_change if "LoKrLayer" in bases else None


def _kind(layer: nn.Module) -> str:
    """PEFT calls most of its layers "Linear"; the module they come from says which method it is."""
    return ".".join((*type(layer).__module__.split(".")[-2:-1], type(layer).__name__))


def _weight_changes(layer: nn.Module, active: Sequence[str]) -> list[Change]:
    read = _reader(type(layer))
    changes = [read(layer, adapter) if read else None for adapter in active]
    return [change for change in changes if change is not None]


def _lora_change(layer: nn.Module, adapter: str) -> Change | None:
    down, up = (_found(layer, name, adapter) for name in ("lora_A", "lora_B"))
    if down is None or up is None:
        return None
    factors = (down._parameters["weight"].detach(), up._parameters["weight"].detach())
    low_rank = LowRank(*factors, float(layer.scaling[adapter]))
    magnitude = _found(layer, "lora_magnitude_vector", adapter)
    return low_rank if magnitude is None else Dora(low_rank, magnitude.weight.detach(), DoraRule.PEFT)


def _loha_change(layer: nn.Module, adapter: str) -> Change | None:
    if adapter not in layer.hada_w1_a:
        return None
    factors = (layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b)
    return Hadamard(*(factor[adapter].detach() for factor in factors), scale=float(layer.scaling[adapter]))


def _lokr_change(layer: nn.Module, adapter: str) -> Change | None:
    w1 = _whole_or_product(layer.lokr_w1, layer.lokr_w1_a, layer.lokr_w1_b, adapter)
    w2 = _whole_or_product(layer.lokr_w2, layer.lokr_w2_a, layer.lokr_w2_b, adapter)
    return Kronecker(w1, w2, float(layer.scaling[adapter])) if w1 and w2 else None


def _whole_or_product(whole: Factors, left: Factors, right: Factors, adapter: str) -> tuple[Tensor, ...]:
    """One factor of LoKr: a matrix, two whose product it is, or nothing where the layer lacks the adapter."""
    if adapter in whole:
        return (whole[adapter].detach(),)
    return (left[adapter].detach(), right[adapter].detach()) if adapter in left else ()


def _bias_changes(layer: nn.Module, active: Sequence[str]) -> list[Change]:
    """`lora_bias`: PEFT adds lora_B's bias, scaled, to the layer's."""
    biases = getattr(layer, "lora_bias", {})
    return [
        Difference(layer.lora_B[adapter].bias.detach(), float(layer.scaling[adapter]))
        for adapter in active
        if biases.get(adapter) and adapter in layer.lora_B
    ]


def _active(layer: nn.Module) -> list[str]:
    """Adapters that PEFT applies at run time: none where they are disabled, or merged into the base already."""
    if layer.disable_adapters or layer.merged_adapters:
        return []
    return list(layer.active_adapters)


def _marks(layer: nn.Module, active: Sequence[str]) -> Hashable:
    """Of each active adapter its name, its scale, and addresses and version counters of its tensors."""
    scales = layer.__dict__.get("scaling") or {}
    marks: list[Hashable] = []
    for adapter in active:
        marks += (adapter, scales.get(adapter))
        for name in layer.adapter_layer_names:
            found = _found(layer, name, adapter)
            if found is not None:
                for tensor in _tensors(found):
                    marks += (tensor.data_ptr(), tensor._version)
    return tuple(marks)


def _found(layer: nn.Module, name: str, adapter: str) -> Any:
    """What an adapter has in one of its layer's places: a module, a tensor, or None. By PyTorch's own methods it takes
    six times as long (0.15 for 0.95 us)."""
    holder = layer._modules.get(name)
    if type(holder) is nn.ModuleDict:
        return holder._modules.get(adapter)
    holder = getattr(layer, name, {}) if holder is None else holder
    return holder[adapter] if adapter in holder else None  # noqa: SIM401 - BufferDict has no get


def _tensors(found: Tensor | nn.Module) -> Iterable[Tensor]:
    """An adapter's tensors in one place; `parameters()`, which walks modules, took a third of the reading's time."""
    if isinstance(found, Tensor):
        return (found,)
    if found._modules:
        return found.parameters()
    return [parameter for parameter in found._parameters.values() if parameter is not None]


def _variant_name(variant: object) -> str:
    return variant.__name__ if isinstance(variant, type) else type(variant).__name__
