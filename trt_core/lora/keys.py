"""The keys of a LoRA file as patches to BFL weights, in every naming that FLUX trainers write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidFile, LoraMismatch
from .changes import Patch
from .factors import Group
from .foreign import likely_model
from .roles import Role, is_text_encoder, split_key
from .scaling import PeftScaling
from .targets import LoraFormat, Shapes, Target, TargetTable


@dataclass(frozen=True, slots=True)
class ReadKeys:
    """The patches of one file, whose naming its keys have, and how many of them are for text encoders."""

    patches: tuple[Patch, ...]
    format: LoraFormat
    text_encoder_keys: int


def read_keys(tensors: Mapping[str, Tensor], shapes: Shapes, metadata: Mapping[str, str] | None = None) -> ReadKeys:
    """All of `tensors` as patches to the architecture `shapes`, in the file's order; tensors are not copied.

    Raises `LoraMismatch` for any key that means nothing here or has the wrong shape, and `InvalidFile` where
    no key is a LoRA's: nothing is dropped in silence. Keys for text encoders are only counted.
    """
    keys = [key for key in tensors if not is_text_encoder(key)]
    text_encoder_keys = len(tensors) - len(keys)
    _require_lora(keys, text_encoder_keys)
    groups, namings = _groups(keys, tensors, TargetTable.of(shapes))
    scaling = PeftScaling.from_metadata(metadata or {})
    patches = tuple(patch for group in groups for patch in group.patches(shapes, scaling))
    naming = namings.most_common(1)[0][0] if namings else LoraFormat.TEXT_ENCODER
    return ReadKeys(patches, naming, text_encoder_keys)


def _require_lora(keys: Collection[str], text_encoder_keys: int) -> None:
    roles = {parts[1] for parts in map(split_key, keys) if parts is not None}
    if text_encoder_keys or roles - {Role.NORM}:
        return
    if any(key.endswith((".weight", ".bias")) for key in keys):
        raise InvalidFile(
            "This file holds whole weights and no LoRA: it looks like a checkpoint.",
            expected="A LoRA file has keys like lora_A.weight, lora_down.weight, lokr_w1 or diff.",
            fix="Load it as the model, or choose a LoRA file.",
        )
    raise InvalidFile(
        f"No key of this file belongs to a LoRA{_first(keys)}.",
        expected="A LoRA file has keys like lora_A.weight, lora_down.weight, lokr_w1 or diff.",
    )


def _groups(
    keys: Collection[str], tensors: Mapping[str, Tensor], table: TargetTable
) -> tuple[list[Group], Counter[LoraFormat]]:
    modules: dict[str, dict[Role, tuple[str, Tensor]]] = {}
    meanings: dict[str, tuple[Target, LoraFormat]] = {}
    unknown: list[str] = []
    for key in keys:
        name, role = split_key(key) or ("", Role.OTHER_METHOD)
        meaning = table.find(name)
        if meaning is None:
            unknown.append(key)
            continue
        meanings[name] = meaning
        tensors_of_module = modules.setdefault(name, {})
        if role in tensors_of_module:
            raise _two_adapters(tensors_of_module[role][0], key)
        tensors_of_module[role] = (key, tensors[key])
    if unknown:
        raise _unknown_keys(unknown, len(keys), tensors, table)
    return _without_copies(modules, meanings)


def _without_copies(
    modules: Mapping[str, Mapping[Role, tuple[str, Tensor]]],
    meanings: Mapping[str, tuple[Target, LoraFormat]],
) -> tuple[list[Group], Counter[LoraFormat]]:
    """One group per target. Some files hold every layer twice, in two namings; that must not count double."""
    groups: dict[tuple[str, tuple[int, int] | None], Group] = {}
    namings: Counter[LoraFormat] = Counter()
    for name, group_tensors in modules.items():
        target, naming = meanings[name]
        namings[naming] += 1
        group = Group(name, target, group_tensors)
        first = groups.setdefault((target.module, target.rows), group)
        if first is not group and not _same_tensors(first, group):
            raise _two_adapters(next(iter(first.tensors.values()))[0], next(iter(group_tensors.values()))[0])
    return list(groups.values()), namings


def _same_tensors(first: Group, second: Group) -> bool:
    if first.tensors.keys() != second.tensors.keys() or first.target.swapped != second.target.swapped:
        return False
    return all(torch.equal(first.tensors[role][1], second.tensors[role][1]) for role in first.tensors)


def _two_adapters(first: str, second: str) -> LoraMismatch:
    return LoraMismatch(
        f"The LoRA has two different tensors for one layer: {first!r} and {second!r}.",
        expected="A file holds one LoRA.",
        fix="Save each LoRA into its own file.",
    )


def _unknown_keys(unknown: list[str], total: int, all_keys: Collection[str], table: TargetTable) -> LoraMismatch:
    model = likely_model(unknown, all_keys)
    made_for = f" It seems to be made for {model}." if model else _reason(unknown, table)
    return LoraMismatch(
        f"{len(unknown)} of {total} LoRA keys fit no layer of this model{_first(unknown)}.{made_for}",
        fix="Use a LoRA that was trained for this FLUX.1 model.",
    )


def _reason(unknown: list[str], table: TargetTable) -> str:
    if any("guidance" in key for key in unknown) and not any("guidance_in" in name for name in table.dotted):
        return " It changes the guidance embedding, which FLUX.1-schnell lacks: it is made for FLUX.1-dev."
    depth = {blocks: table.depth(blocks) for blocks in ("double_blocks", "single_blocks")}
    return f" This model has {depth['double_blocks']} double and {depth['single_blocks']} single blocks."


def _first(keys: Collection[str]) -> str:
    shown = ", ".join(repr(key) for key in list(keys)[:3])
    return f" (first: {shown})" if shown else " (it holds no tensors)"
