"""LoRA files kept parsed in memory, least recently used first out, and put on a patcher as ComfyUI's own loaders do."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import folder_paths
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ...trt_core.errors import InvalidFile, LoraMismatch

NONE = "none"


@dataclass(frozen=True, slots=True)
class Slot:
    """One line of the node: a file below models/loras, its strength, and the widget it came from."""

    file: str
    strength: float
    widget: str


@dataclass(frozen=True, slots=True)
class LoraFile:
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None
    size_bytes: int


class LoraShelf:
    """Files by path and time of change, at most `limit_bytes` of them beside the one asked for."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[str, float, int], LoraFile] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str, limit_bytes: int) -> LoraFile:
        """The file, read where it is new or was changed. Raises `InvalidFile`."""
        path = folder_paths.get_full_path("loras", name)
        if path is None:
            raise InvalidFile(f"The LoRA {name} is not in the loras folder.", fix="Choose another file.")
        stat = os.stat(path)
        key = (path, stat.st_mtime, stat.st_size)
        with self._lock:
            found = self._files.pop(key, None) or _read(path, name)
            self._files[key] = found
            self._drop_until(limit_bytes)
        return found

    def clear(self) -> None:
        with self._lock:
            self._files.clear()

    def _drop_until(self, limit_bytes: int) -> None:
        while len(self._files) > 1 and sum(file.size_bytes for file in self._files.values()) > limit_bytes:
            self._files.popitem(last=False)


SHELF = LoraShelf()


def with_loras(patcher: Any, slots: list[Slot], limit_bytes: int) -> tuple[Any, list[int]]:
    """A clone with all slots applied in order, and how many weights each changes.

    The same calls as ComfyUI's loaders, so the same result to the bit. Raises `LoraMismatch` for a file without any key
    for this model: the stock loaders only log that.
    """
    clone, counts = patcher.clone(), []
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {}) if slots else {}
    for slot in slots:
        file = SHELF.take(slot.file, limit_bytes)
        loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(file.tensors)), key_map, log_missing=False)
        changed = clone.add_patches(loaded, slot.strength)
        if not changed:
            raise LoraMismatch(
                f"{slot.file} changes nothing in this model.", expected="A LoRA for FLUX.1.",
                fix="It may be made for another model, or hold text encoder weights alone. Choose another file.",
                widget=slot.widget,
            )  # fmt: skip
        if file.metadata:
            clone.set_attachments("lora_metadata", file.metadata)
        counts.append(len({key if isinstance(key, str) else key[0] for key in changed}))
    return clone, counts


def _read(path: str, name: str) -> LoraFile:
    if not path.endswith((".safetensors", ".sft")):
        raise InvalidFile(
            f"{name} is not a .safetensors file.", expected="Pickle files can run any program when they are opened.",
            fix="Download the .safetensors version.",
        )  # fmt: skip
    # Read as bytes, not mapped as ComfyUI does: a first merge would wait for the disk, and Windows would lock the file.
    # No copies by PyTorch either, whose threads take milliseconds for each tensor on a busy machine.
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load(Path(path).read_bytes())
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{name} is truncated or damaged ({error}).", fix="Download it again.") from error
    return LoraFile(tensors, metadata, sum(tensor.nbytes for tensor in tensors.values()))
