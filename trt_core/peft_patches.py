"""Reads what PEFT's adapter layers would do to their base weights, as patches with a signature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .diffusers_binding import Slot
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


def read_patches(slots: Iterable[Slot]) -> PeftPatches:
    """What the active adapters of these places do. A base weight that was changed in place changes the signature, so
    that the next refit merges it anew; diffusers' methods that change adapters in place release the model before."""
    slots = list(slots)
    result = PeftPatches()
    collected: dict[str, tuple[list[Hashable], list[tuple[Patch, float]]]] = {}
    for slot in slots:
        layer = slot.module()
        if "base_layer" not in layer._modules or not hasattr(layer, "active_adapters"):
            continue
        active = _active(layer)
        reason = why_not_mergeable(layer, active)
        if reason:
            result.unmergeable[slot.name] = reason
            continue
        signature, changes = (_bias_changes if slot.kind == "bias" else _weight_changes)(layer, active)
        if changes:
            marks, patches = collected.setdefault(slot.name, ([], []))
            marks.append((slot.rows, signature))
            patches.extend((Patch(slot.name, slot.rows, change), 1.0) for change in changes)
    for slot in slots:
        if slot.name in collected and (base := slot.parameter()) is not None:
            collected[slot.name][0].append(base._version)
    result.weights = {n: WeightPatches(tuple(marks), tuple(p)) for n, (marks, p) in collected.items()}
    return result


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


def _weight_changes(layer: nn.Module, active: Sequence[str]) -> tuple[Hashable, list[Change]]:
    signature, changes = [], []
    read = _reader(type(layer))
    for adapter in active:
        change = read(layer, adapter) if read else None
        if change is not None:
            changes.append(change)
            signature.append((adapter, *_marks(layer, adapter)))
    return tuple(signature), changes


def _lora_change(layer: nn.Module, adapter: str) -> Change | None:
    downs = layer.lora_A
    if adapter not in downs:
        return None
    low_rank = LowRank(
        downs[adapter].weight.detach(),
        layer.lora_B[adapter].weight.detach(),
        float(layer.scaling[adapter]),
    )
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if adapter in magnitudes:
        return Dora(low_rank, magnitudes[adapter].weight.detach(), DoraRule.PEFT)
    return low_rank


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


def _bias_changes(layer: nn.Module, active: Sequence[str]) -> tuple[Hashable, list[Change]]:
    """`lora_bias`: PEFT adds lora_B's bias, scaled, to the layer's."""
    signature, changes = [], []
    for adapter in active:
        if getattr(layer, "lora_bias", {}).get(adapter) and adapter in layer.lora_B:
            changes.append(Difference(layer.lora_B[adapter].bias.detach(), float(layer.scaling[adapter])))
            signature.append((adapter, *_marks(layer, adapter)))
    return tuple(signature), changes


def _active(layer: nn.Module) -> list[str]:
    """Adapters that PEFT applies at run time: none where they are disabled, or merged into the base already."""
    if layer.disable_adapters or layer.merged_adapters:
        return []
    return list(layer.active_adapters)


def _marks(layer: nn.Module, adapter: str) -> tuple[Hashable, ...]:
    """Scale, addresses and version counters of an adapter's tensors. The applied patches keep those tensors alive, so
    no other tensor can come to lie at the same address while they are compared."""
    tensors: list[Tensor] = []
    for name in layer.adapter_layer_names:
        holder = layer._modules.get(name)
        if holder is None:
            holder = getattr(layer, name, {})
        if adapter in holder:
            tensors += _tensors(holder[adapter])
    scale = getattr(layer, "scaling", {}).get(adapter)
    return (scale, *((t.data_ptr(), t._version) for t in tensors))


def _tensors(found: Tensor | nn.Module) -> Iterable[Tensor]:
    """An adapter's tensors in one place; `parameters()`, which walks modules, took a third of `read_patches`' time."""
    if isinstance(found, Tensor):
        return (found,)
    if found._modules:
        return found.parameters()
    return (parameter for parameter in found._parameters.values() if parameter is not None)


def _variant_name(variant: object) -> str:
    return variant.__name__ if isinstance(variant, type) else type(variant).__name__
