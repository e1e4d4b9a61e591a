"""Keeps the unchanged weights of LoRA-touched layers: on the GPU where there is room, else in pinned host memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import BaseWeights
from .errors import OutOfMemory

_LOG = logging.getLogger("trt_core.weights")

GPU_RESERVE_BYTES = 3 * 2**30
"""Left free on the GPU when base weights go there: activations, VAE decode, and the fp32 sum of the largest layer."""
_ALIGNMENT_BYTES = 256
_SLAB_BYTES = 2**30
"""Host memory is pinned in slabs of a power of two, because PyTorch's pinned allocator rounds every block up to one:
a 132 MB weight by itself would take 256 MB."""


class HostSlabs:
    """Pinned host memory, handed out piece by piece and kept for the next use: pinning takes 0.4 s per GiB."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._used: list[int] = []

    def take(self, like: Tensor) -> Tensor:
        """A pinned tensor of the shape and dtype of `like`, valid until `reset`. Raises `OutOfMemory`."""
        size = -(-like.numel() * like.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        # The first slab with room: small weights fill what large ones leave, else a tenth of the memory would be lost.
        index = next((i for i, used in enumerate(self._used) if used + size <= self._slabs[i].numel()), None)
        if index is None:
            self._slabs.append(_pinned(max(_SLAB_BYTES, size)))
            self._used.append(0)
            index = len(self._slabs) - 1
        start = self._used[index]
        self._used[index] += size
        piece = self._slabs[index][start : start + like.numel() * like.element_size()]
        return piece.view(like.dtype).view(like.shape)

    def reset(self) -> None:
        """Everything handed out is free again; the memory stays pinned."""
        self._used = [0] * len(self._slabs)


class BaseStorage:
    """Copies of base weights by name. `mode` says where new ones go; `AUTO` looks at free GPU memory each time."""

    def __init__(self, mode: BaseWeights, device: torch.device, slabs: HostSlabs | None = None) -> None:
        self._mode, self._device = mode, device
        self._gpu: dict[str, Tensor] = {}
        self._host: dict[str, Tensor] = {}
        self._slabs = slabs or HostSlabs()
        self._slabs.reset()

    def __contains__(self, name: str) -> bool:
        return name in self._gpu or name in self._host

    def __getitem__(self, name: str) -> Tensor:
        """The base weight, on the GPU or in pinned host memory."""
        return self._gpu[name] if name in self._gpu else self._host[name]

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Copies these weights before they are changed; all or none. Raises `OutOfMemory`."""
        new = {name: tensor for name, tensor in weights.items() if name not in self}
        needed = sum(t.numel() * t.element_size() for t in new.values())
        if not new:
            return
        if self._where(needed) is BaseWeights.GPU:
            self._keep_on_gpu(new)
        else:
            self._keep_on_host(new)

    def give_back(self, name: str) -> None:
        """The weight is unchanged again: GPU copies go, host copies stay for the next LoRA (pinning is slow)."""
        self._gpu.pop(name, None)

    def forget(self) -> None:
        """Drops every copy; the weights they belong to are gone or were replaced."""
        self._gpu.clear()
        self._host.clear()
        self._slabs.reset()

    @property
    def gpu_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._host.values())

    def _where(self, needed_bytes: int) -> BaseWeights:
        if self._mode is not BaseWeights.AUTO or self._device.type != "cuda":
            return self._mode if self._device.type == "cuda" else BaseWeights.GPU
        free, _ = torch.cuda.mem_get_info(self._device)
        reusable = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        fits = free + reusable >= needed_bytes + GPU_RESERVE_BYTES
        _LOG.debug("base weights: %d bytes needed, %d free on the GPU", needed_bytes, free + reusable)
        return BaseWeights.GPU if fits else BaseWeights.HOST

    def _keep_on_gpu(self, weights: Mapping[str, Tensor]) -> None:
        try:
            copies = {name: tensor.clone() for name, tensor in weights.items()}
        except torch.OutOfMemoryError as error:
            if self._mode is BaseWeights.AUTO:
                self._keep_on_host(weights)
                return
            raise OutOfMemory(
                "The base weights do not fit on the GPU beside the bound ones.",
                fix='Use base_weights="host" or "auto".',
                widget="base_weights",
            ) from error
        self._gpu.update(copies)

    def _keep_on_host(self, weights: Mapping[str, Tensor]) -> None:
        copies = {}
        for name, tensor in weights.items():
            copies[name] = self._slabs.take(tensor).copy_(tensor, non_blocking=True)
        torch.cuda.synchronize(self._device)
        self._host.update(copies)


def _pinned(size_bytes: int) -> Tensor:
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise OutOfMemory(
            f"{size_bytes / 2**30:.1f} GiB of host memory for base weights could not be pinned.",
            fix='Close other programs, or use base_weights="gpu" where the GPU has room.',
            widget="base_weights",
        ) from error
