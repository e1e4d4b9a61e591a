"""Keeps ComfyUI's own copy of the compiled blocks off the GPU, and its LoRA patching away from them.

The bound weights are the only copy on the GPU: ComfyUI loads what lies around the blocks (0.6 % of the weights), with
its own LoRA patching, and blocks that run through ComfyUI's code borrow the bound weights (`blocks.Lender`).

Legacy ModelPatcher: `load` moves and patches every module that it finds, so the blocks are taken out of its sight for
that moment. The uuid that says which patches are in the weights is exchanged for one that stands for the patches around
the blocks alone: a LoRA that touches only blocks then costs ComfyUI no unload and load.
Dynamic VRAM: weights come to the GPU when a layer runs, so blocks that do not run cost nothing; only ComfyUI's estimate
of what the model will need has to be told.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import weights
from .lora_patches import signature
from .resident import Resident

_KEY = "trt_core"


@contextmanager
def around_blocks(patcher: Any, resident: Resident, foreign: frozenset[str]) -> Iterator[None]:
    """While inside, ComfyUI loads the model without its blocks, except `foreign` ones, and the bound weights with it.

    The patcher is changed only in here: its size, its uuid (legacy) and its `load`.
    """
    size, patches_uuid, load = patcher.model_size(), patcher.patches_uuid, patcher.load
    rest = max(1, size - resident.replaced_bytes)

    def load_rest(*args: Any, **kwargs: Any) -> Any:
        if patcher.is_dynamic():
            patcher.size = size  # address space is reserved for the whole model at the first load
            try:
                return load(*args, **kwargs)
            finally:
                patcher.size = rest
        with _hidden_blocks(weights.flux_of(patcher), foreign):
            return load(*args, **kwargs)

    if not resident.companion.bound:
        _give_back_blocks(patcher)
    resident.own_copy.belongs_to(patcher)
    resident.companion.bind = lambda: resident.bind(patcher)
    patcher.load, patcher.size = load_rest, rest
    if not patcher.is_dynamic():
        patcher.patches_uuid = _rest_uuid(patcher, resident, foreign)
    patcher.set_additional_models(_KEY, [resident.companion])
    try:
        yield
    finally:
        resident.companion.bind = None
        patcher.remove_additional_models(_KEY)
        del patcher.load
        patcher.size, patcher.patches_uuid = size, patches_uuid


@contextmanager
def _hidden_blocks(flux: nn.Module, foreign: frozenset[str]) -> Iterator[None]:
    hidden = {kind: flux._modules[kind] for kind in weights.BLOCK_LISTS}
    for kind, blocks in hidden.items():
        visible = nn.Module()
        for index, block in blocks.named_children():
            if f"{kind}.{index}" in foreign:
                visible.add_module(index, block)
        flux._modules[kind] = visible
    try:
        yield
    finally:
        flux._modules.update(hidden)


def _rest_uuid(patcher: Any, resident: Resident, foreign: frozenset[str]) -> uuid.UUID:
    """One uuid for each set of patches outside the compiled blocks."""
    rest = []
    for key, patches in patcher.patches.items():
        block = weights.block_of(key.removeprefix(weights.PREFIX))
        if not block or block in foreign:
            rest.append((key, signature(patches)))
    wrapped = tuple((key, tuple(map(id, functions))) for key, functions in patcher.weight_wrapper_patches.items())
    state = (tuple(rest), foreign, wrapped, patcher.force_cast_weights)
    if state not in resident.stem_uuids:
        resident.stem_uuids = {state: uuid.uuid4()}  # only the last one can be in the weights
    return resident.stem_uuids[state]


def _give_back_blocks(patcher: Any) -> None:
    """Takes what an ordinary run has left on the GPU of this model off it, before the weights are bound."""
    if patcher.load_device == patcher.offload_device:
        return
    if patcher.is_dynamic():
        patcher.partially_unload(None, 1e32)
    elif patcher.model.current_weight_patches_uuid is not None:
        patcher.unpatch_model(patcher.offload_device)
