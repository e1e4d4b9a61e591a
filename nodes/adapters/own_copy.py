"""ComfyUI's own copy of the weights as the source of unmerged ones: read again at a refit, no second copy is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import psutil
import torch
from torch import Tensor

from ...trt_core.errors import TRTError
from . import weights

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


class OwnCopy:
    """A `BaseSource` for one model. Holds no model: the patcher of the run that is going on is known weakly."""

    def __init__(
        self, names: Mapping[str, str], device: torch.device, dtype: torch.dtype, spare_gpu: Callable[[], float]
    ) -> None:
        self._names, self._device, self._dtype, self._spare_gpu = names, device, dtype, spare_gpu
        self._patcher: Callable[[], Any] = lambda: None

    def belongs_to(self, patcher: Any) -> None:
        """Reads from this patcher's model from now on."""
        self._patcher = weakref.ref(patcher)

    def read(self, name: str, device: torch.device) -> Tensor:
        """The base weight without any LoRA, as it was bound."""
        patcher = self._patcher()
        if patcher is None:
            raise TRTError("ComfyUI has unloaded the model during a run.", fix="Queue the prompt again.")
        return weights.read_base(patcher, self._names[name], device, self._dtype)

    def spare_gpu_bytes(self) -> int:
        return int(min(self._spare_gpu(), 2**62))

    def spare_host_bytes(self) -> int:
        """What can be pinned so that models, text encoders and pictures still have room, and ComfyUI its own pins."""
        memory = psutil.virtual_memory()
        reserve = min(16 * _GIB, max(4 * _GIB, memory.total * 15 // 100))
        return max(0, int(min(min(memory.available, _container_bytes()) - reserve, _pinnable_bytes())))


def _pinnable_bytes() -> float:
    """What ComfyUI leaves of the memory that it lets itself pin: none with --disable-pinned-memory."""
    limit = getattr(comfy.model_management, "MAX_PINNED_MEMORY", None)
    if limit is None:
        return float("inf")
    return limit - getattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0)


def _container_bytes() -> float:
    """Free memory of the container that this runs in, whose limit is not in the system's figures."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        pages = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - used + int(pages.get("inactive_file", 0))
