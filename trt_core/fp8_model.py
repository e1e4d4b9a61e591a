"""A diffusers transformer whose blocks run in FP8: its own parameters are the bases, on the GPU or in host memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import BaseWeights
from .diffusers_binding import DiffusersBinding, Slot, find_slots
from .errors import UnsupportedGPU
from .extras import DoubleOverride, SingleOverride
from .flux.architecture import FluxArchitecture
from .fp8_recipe import Fp8Recipe
from .fp8_weights import base_place
from .gpu import current_gpu, why_not_fp8

_LOG = logging.getLogger("trt_core.fp8")


def require_fp8(device: torch.device) -> None:
    """Raises `UnsupportedGPU` where this GPU has no FP8 products. The CPU computes them in fp32, for tests."""
    if device.type == "cuda" and (reason := why_not_fp8(current_gpu())):
        raise UnsupportedGPU(
            f"FP8 cannot run here: {reason}.", fix="Run in bf16: call dequantize_(model), or leave out FP8.",
        )  # fmt: skip


def compute_device(model: Any) -> torch.device:
    """Where the model computes: what lies around the blocks is always there."""
    return model.x_embedder.weight.device


def to_compute_device(model: nn.Module) -> None:
    """Moves what FP8 keeps in host memory to where the model computes."""
    device = compute_device(model)
    nn.Module._apply(model, lambda tensor: tensor.to(device))


def gather(model: nn.Module) -> None:
    """`to_compute_device`; where the GPU is too small for the whole model, a warning that says what to do."""
    try:
        to_compute_device(model)
    except torch.OutOfMemoryError:
        _LOG.warning(
            "TRT FP8: some weights stay in host memory, because the model does not fit on the GPU in full size; "
            "compile it in FP8 again, or use enable_sequential_cpu_offload()"
        )


def show_base(binding: DiffusersBinding) -> Callable[[str, Tensor], None]:
    """A function that lets the parameters of one weight show its base, wherever that has been put."""
    slots: dict[str, list[Slot]] = {}
    for slot in binding.slots:
        slots.setdefault(slot.name, []).append(slot)

    def placed(name: str, base: Tensor) -> None:
        for slot in slots[name]:
            parameter = slot.parameter()
            if parameter is not None:
                parameter.data = slot.of(base)

    return placed


class ChangedBases:
    """Bases of FP8 layers, and biases that are corrected, that somebody changed in place: segments read copies of them.

    A change through `.data` or of the memory behind it cannot be seen; one through the parameter itself can.
    """

    def __init__(self, slots: Sequence[Slot], recipe: Fp8Recipe) -> None:
        copied = (recipe.quantizes, recipe.corrects)
        self._slots = [slot for slot in slots if any(is_copied(slot.name) for is_copied in copied)]
        self._versions = self._now()

    def changed(self) -> list[str]:
        """BFL names of those that were changed since the last call."""
        before, self._versions = self._versions, self._now()
        different = (s.name for s, a, b in zip(self._slots, before, self._versions, strict=True) if a != b)
        return list(dict.fromkeys(different))

    def _now(self) -> list[int]:
        return [-1 if (p := slot.parameter()) is None else p._version for slot in self._slots]


def adapters_to_bases(model: nn.Module, arch: FluxArchitecture) -> None:
    """Moves adapters to where what they change lies: PEFT adds one to the other in place."""
    for slot in find_slots(model, arch):
        base = slot.parameter()
        for adapter in adapters_of(slot) if base is not None else ():
            adapter.data = adapter.data.to(base.device)


def adapters_of(slot: Slot) -> list[nn.Parameter]:
    """What PEFT has beside one parameter: matrices for a weight, `lora_bias` for a bias, which may lie elsewhere."""
    named = slot.module().named_parameters()
    return [
        adapter
        for name, adapter in named
        if not name.startswith("base_layer.") and name.endswith(".bias") is (slot.kind == "bias")
    ]


def moving(
    model: Any, arch: FluxArchitecture, recipe: Fp8Recipe, mode: BaseWeights, move: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """`move` (what `.to(...)` does to one tensor) that leaves the bases of FP8 layers in host memory where they belong
    there: the GPU then never holds the model in full size."""
    moved = move(torch.empty(0, dtype=model.dtype))
    if base_place(mode, arch, recipe, moved.device, given_there=False).where is BaseWeights.GPU:
        return move
    kept = {id(slot.parameter()) for slot in find_slots(model, arch) if recipe.quantizes(slot.name)}
    return lambda tensor: tensor.to(moved.dtype) if id(tensor) in kept else move(tensor)


def overrides_on(
    device: torch.device, slots: Sequence[Slot],
    doubles: Mapping[int, DoubleOverride], singles: Mapping[int, SingleOverride],
) -> tuple[dict[int, DoubleOverride], dict[int, SingleOverride]]:  # fmt: skip
    """Overrides that run diffusers' own blocks, with the blocks' bases on `device` while each runs."""
    by_block: dict[str, list[Slot]] = {}
    for slot in slots:
        by_block.setdefault(".".join(slot.name.split(".")[:2]), []).append(slot)

    def double(index: int, run: DoubleOverride) -> DoubleOverride:
        def lent(*args: Any) -> tuple[Tensor, Tensor]:
            with _lent(by_block[f"double_blocks.{index}"], device):
                return run(*args)

        return lent

    def single(index: int, run: SingleOverride) -> SingleOverride:
        def lent(*args: Any) -> Tensor:
            with _lent(by_block[f"single_blocks.{index}"], device):
                return run(*args)

        return lent

    return {i: double(i, run) for i, run in doubles.items()}, {i: single(i, run) for i, run in singles.items()}


@contextmanager
def _lent(slots: list[Slot], device: torch.device) -> Iterator[None]:
    """Parameters of these places on `device`; adapters were made where the bases lie, so theirs too."""
    parameters = {id(p): p for slot in slots for p in slot.module().parameters()}.values()
    before = [(p, p.data) for p in parameters]
    try:
        for parameter, data in before:
            parameter.data = data.to(device, non_blocking=True)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
