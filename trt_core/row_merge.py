"""Merges of plain sums by PyTorch, row by row: where no Triton kernel can do it (`low_rank_merge`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .lora.changes import Additive, Patch


def disjoint(patches: Sequence[tuple[Patch, float]]) -> bool:
    """Whether every patch is a plain sum and no two touch the same row: the common case, one LoRA on a layer."""
    if any(not isinstance(patch.change, Additive) for patch, _ in patches):
        return False
    if any(patch.rows is None for patch, _ in patches):
        return len(patches) == 1
    rows = sorted(patch.rows for patch, _ in patches if patch.rows is not None)
    return all(before[1] <= after[0] for before, after in itertools.pairwise(rows))


def add_rows(bound: Tensor, base: Tensor, patches: Sequence[tuple[Patch, float]]) -> None:
    """bound = base + strength * delta without an fp32 copy of the weight.

    The same bits as `merged`: the addition promotes the base to fp32 and rounds the sum once, in one kernel.
    """
    covered = 0
    for patch, strength in sorted(patches, key=lambda item: item[0].rows or (0, 0)):
        start, stop = patch.rows or (0, bound.shape[0])
        bound[covered:start].copy_(base[covered:start])
        _add(bound[start:stop], base[start:stop], patch.change, strength)
        covered = stop
    bound[covered:].copy_(base[covered:])


def _add(bound: Tensor, base: Tensor, change: object, strength: float) -> None:
    if not isinstance(change, Additive) or strength == 0:
        bound.copy_(base)
        return
    delta = change.delta(bound.device).reshape(bound.shape)
    factor = strength * change.scale
    torch.add(base, delta if factor == 1 else delta.mul_(factor), out=bound)
