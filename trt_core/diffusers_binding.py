"""Binds a diffusers FLUX transformer: its parameters become views of the fused tensors that the segments read.

A parameter changed in place is then seen by the engines without a copy. A parameter that was re-assigned is noticed
at the next call and brought home.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UnsupportedModel
from .flux.architecture import FluxArchitecture
from .flux.weights import Part, diffusers_parts
from .fp8_recipe import is_modulation
from .weights import BoundWeights

_FREE_EVERY_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter's place: `parent._modules[child]` holds it (or a PEFT layer around its holder), as `kind`."""

    parent: nn.Module
    child: str
    kind: str
    name: str
    rows: tuple[int, int] | None
    """Rows of the fused BFL weight `name`; None for all of it."""

    def module(self) -> nn.Module:
        """What stands in this place now: the layer itself, or an adapter layer around it."""
        return self.parent._modules[self.child]  # type: ignore[return-value]

    def parameter(self) -> nn.Parameter | None:
        holder: nn.Module | None = self.module()
        while holder is not None and "base_layer" in holder._modules:
            holder = holder._modules["base_layer"]
        return None if holder is None else holder._parameters.get(self.kind)

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


class DiffusersBinding:
    """The slots of one transformer and the tensors they are bound to."""

    def __init__(self, model: nn.Module, arch: FluxArchitecture) -> None:
        self.slots = list(find_slots(model, arch))
        self.blocks = _blocks(model)
        self.tensors = self._bind()
        self._addresses = [slot.of(self.tensors[slot.name]).data_ptr() for slot in self.slots]
        """Where each slot's parameter was last put: comparing numbers costs half a millisecond per call, slicing the
        bound tensors anew would cost five."""
        self._shown: dict[str, Tensor] = {}
        """By name, the base that its parameters show. They hold its memory as well."""
        self._places: dict[str, list[tuple[int, Slot]]] = {}
        for place in enumerate(self.slots):
            self._places.setdefault(place[1].name, []).append(place)

    def same_blocks(self, model: nn.Module) -> bool:
        """Whether the model still has the blocks that were bound."""
        now = _blocks(model)
        return len(now) == len(self.blocks) and all(a is b for a, b in zip(now, self.blocks, strict=True))

    def moved(self) -> list[Slot]:
        """Slots whose parameter was re-assigned since: its data is somewhere else than where it was put."""
        return [
            slot
            for slot, address in zip(self.slots, self._addresses, strict=True)
            if (p := slot.parameter()) is None or p.data_ptr() != address
        ]

    def bring_home(self, slots: list[Slot]) -> str | None:
        """Copies re-assigned parameters into the bound tensors, or says why that cannot be; `point_at_bases` then
        points them there."""
        for slot in slots:
            self._shown.pop(slot.name, None)
            parameter, home = slot.parameter(), slot.of(self.tensors[slot.name])
            if parameter is None or parameter.shape != home.shape or parameter.device != home.device:
                return f"{slot.name} was replaced by something of another shape or device"
            if parameter.dtype != home.dtype:
                return f"{slot.name} was replaced by {parameter.dtype}"
            with torch.no_grad():
                home.copy_(parameter)
        return None

    def point_at_bases(self, weights: BoundWeights) -> None:
        """Lets every parameter show its base weight: the kept copy of a LoRA-touched one, the bound tensor otherwise.

        diffusers and PEFT then read and change what they expect, while the engines run on the merged weights. Those
        that show their base already are left alone, so that another LoRA on the same layers points nothing anew.
        """
        for name, places in self._places.items():
            if self._shown.get(name) is not (base := weights.base(name)):
                self._point(places, base)
                self._shown[name] = base

    def _point(self, places: list[tuple[int, Slot]], base: Tensor) -> None:
        for index, slot in places:
            parameter, part = slot.parameter(), slot.of(base)
            self._addresses[index] = part.data_ptr()
            if parameter is not None and parameter.data_ptr() != part.data_ptr():
                parameter.data = part

    def _bind(self) -> dict[str, Tensor]:
        tensors, freed_bytes = {}, 0
        for name, slots in slots_by_name(self.slots).items():
            tensors[name], copied_bytes = _home(slots)
            freed_bytes += copied_bytes
            if freed_bytes > _FREE_EVERY_BYTES and torch.cuda.is_initialized():
                # The freed q, k, v blocks are too small for the next fused tensor; without this the allocator would
                # hold 7 GB of them for the 12 B model.
                torch.cuda.empty_cache()
                freed_bytes = 0
        return tensors


def slots_by_name(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    """The places of each fused weight's parts."""
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        found.setdefault(slot.name, []).append(slot)
    return found


class ChangedModulations:
    """Whether somebody changed a modulation's parameters in place, through the parameters themselves."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = [slot for slot in slots if is_modulation(slot.name.rpartition(".")[0])]
        self._versions = self._now()

    def changed(self) -> bool:
        """Since the last call."""
        before, self._versions = self._versions, self._now()
        return before != self._versions

    def _now(self) -> list[int]:
        parameters = (slot.parameter() for slot in self._slots)
        return [-1 if p is None or p.is_inference() else p._version for p in parameters]


def _home(slots: list[Slot]) -> tuple[Tensor, int]:
    """The tensor that holds these parameters one after the other, and how many bytes were copied to make it."""
    parameters = [_present(slot) for slot in slots]
    first = parameters[0]
    if len(parameters) == 1:
        if not first.is_contiguous():
            first.data = first.data.contiguous()
        return first.data, 0
    total = sum(p.shape[0] for p in parameters)
    if _adjacent(parameters):
        return torch.as_strided(first.data, (total, *first.shape[1:]), first.stride(), first.storage_offset()), 0
    fused = torch.empty((total, *first.shape[1:]), dtype=first.dtype, device=first.device)
    for slot, parameter in zip(slots, parameters, strict=True):
        view = slot.of(fused)
        view.copy_(parameter.data)
        parameter.data = view
    return fused, fused.numel() * fused.element_size()


def _present(slot: Slot) -> nn.Parameter:
    parameter = slot.parameter()
    if parameter is None:
        raise UnsupportedModel(
            f"{slot.name} has no parameter: {type(slot.module()).__name__} stands in its place.",
            expected="A FLUX transformer with plain linear layers.",
            fix="Load it without quantization; FP8 is applied after loading.",
        )
    if parameter.is_meta:
        raise UnsupportedModel(
            f"{slot.name} has no data here: the pipeline moves weights layer by layer.",
            fix="Use enable_model_cpu_offload() instead of enable_sequential_cpu_offload(), or base_weights='host'.",
        )
    return parameter


def _adjacent(parameters: list[nn.Parameter]) -> bool:
    """Whether the parameters already lie one after the other in one storage, as an earlier binding left them."""
    storage = parameters[0].untyped_storage().data_ptr()
    expected = parameters[0].data_ptr()
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() != storage or parameter.data_ptr() != expected:
            return False
        if not parameter.is_contiguous():
            return False
        expected += parameter.numel() * parameter.element_size()
    return True


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]  # type: ignore[union-attr, list-item]


def find_slots(model: nn.Module, arch: FluxArchitecture) -> Iterator[Slot]:
    """Every parameter's place in a diffusers model; raises `UnsupportedModel` where one is missing."""
    for name, parts in diffusers_parts(arch).items():
        for part in parts:
            yield _slot(model, name, part, whole=len(parts) == 1)


def _slot(model: nn.Module, name: str, part: Part, whole: bool) -> Slot:
    path, kind = part.source.rsplit(".", 1)
    parent_path, _, child = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        parent.get_submodule(child)
    except AttributeError as error:
        raise UnsupportedModel(f"The model has no {path}.", expected="A FLUX.1 transformer has it.") from error
    return Slot(parent, child, kind, name, None if whole else (part.start, part.stop))
