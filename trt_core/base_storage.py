"""Keeps the unchanged weights of LoRA-touched layers: on the GPU where there is room, else in pinned host memory, else
nowhere: they are read again from the program's own copy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from .config import BaseWeights
from .errors import OutOfMemory
from .host_slabs import HostSlabs, piece_bytes

_LOG = logging.getLogger("trt_core.weights")

GPU_RESERVE_BYTES = 3 * 2**30
"""Left free on the GPU when base weights go there: activations, VAE decode, and the fp32 sum of the largest layer."""


def spare_gpu_bytes(device: torch.device) -> int:
    """What tensors may still take on this GPU: what is free, and what PyTorch holds unused, within the limit of
    `torch.cuda.set_per_process_memory_fraction`."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    # Older than PyTorch's way to ask for the limit: none is known.
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return min(free + unused, int(total * fraction) - allocated)


class BaseSource(Protocol):
    """A copy of all unchanged weights that the program around us has anyway: kept copies then only save time."""

    def read(self, name: str, device: torch.device) -> Tensor:
        """The unchanged weight in the bound dtype: the same bits each time, in memory that is the caller's."""

    def spare_gpu_bytes(self) -> int:
        """GPU memory that copies may take now, beside what the program needs next."""

    def spare_host_bytes(self) -> int:
        """Host memory that may be pinned for copies now."""


class _Place(Enum):
    GPU = "GPU"
    HOST = "host"
    SOURCE = "source"


class BaseStorage:
    """Base weights by name. `mode` says where copies go; `AUTO` looks at free GPU memory each time.

    With a `source`, host copies are made only where host memory is spare, and GPU copies can be taken back at any time
    (`free_gpu`): what has no copy is read from the source, and copied again once there is room.
    """

    def __init__(
        self, mode: BaseWeights, device: torch.device, slabs: HostSlabs | None = None, source: BaseSource | None = None
    ) -> None:
        self._mode, self._device = mode, device
        self._gpu: dict[str, Tensor] = {}
        self._host: dict[str, Tensor] = {}
        self._uncopied: dict[str, int] = {}
        """Bytes of those that are read from the source."""
        self._slabs, self._source = slabs or HostSlabs(), source
        self._slabs.reset()

    def __contains__(self, name: str) -> bool:
        return name in self._gpu or name in self._host or name in self._uncopied

    def __getitem__(self, name: str) -> Tensor:
        """The base weight, on the GPU or in host memory; not to be changed."""
        if name in self._gpu:
            return self._gpu[name]
        if name in self._host:
            return self._host[name]
        if name not in self._uncopied or self._source is None:
            raise KeyError(name)
        return self._read(name, self._source)

    def on_gpu(self, name: str) -> bool:
        """Whether reading this one takes no GPU memory."""
        return name in self._gpu

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Remembers these weights before they are changed; all or none. Raises `OutOfMemory`."""
        new = {name: tensor for name, tensor in weights.items() if name not in self}
        if new:
            self._keep_in(self._where(_bytes(new.values())), new)

    def give_back(self, name: str) -> None:
        """The weight is unchanged again: GPU copies go, host copies stay for the next LoRA (pinning is slow)."""
        self._gpu.pop(name, None)
        self._uncopied.pop(name, None)

    def forget(self) -> None:
        """Drops every copy; the weights they belong to are gone or were replaced."""
        self._gpu.clear()
        self._host.clear()
        self._uncopied.clear()
        self._slabs.reset()

    def free_gpu(self, wanted_bytes: float) -> int:
        """Lets go of GPU copies until `wanted_bytes` are free or none is left; returns the bytes that are free now.

        Without a source they move to host memory.
        """
        going: dict[str, Tensor] = {}
        for name in self._gpu:
            if _bytes(going.values()) >= wanted_bytes:
                break
            going[name] = self._gpu[name]
        if self._source is None and self._device.type != "cuda":
            return 0  # they lie in host memory already, and nobody else has them
        self._keep_in(_Place.HOST if self._source is None else _Place.SOURCE, going)
        for name in going:
            del self._gpu[name]
        return _bytes(going.values())

    @property
    def gpu_bytes(self) -> int:
        """What lies on the device of the bound weights."""
        return _bytes(self._gpu.values())

    @property
    def host_bytes(self) -> int:
        return _bytes(self._host.values())

    def _where(self, needed_bytes: int) -> _Place:
        if self._device.type != "cuda":
            copied = self._source is None or self._mode is BaseWeights.GPU
            return _Place.GPU if copied else _Place.SOURCE  # nothing is faster than to read it from there
        if self._mode is BaseWeights.GPU or (self._mode is BaseWeights.AUTO and self._fits_gpu(needed_bytes)):
            return _Place.GPU
        return _Place.HOST if self._fits_host(needed_bytes) else _Place.SOURCE

    def _fits_gpu(self, needed_bytes: int) -> bool:
        if self._source is not None and needed_bytes > self._source.spare_gpu_bytes():
            return False
        if self._device.type != "cuda":
            return True
        spare = spare_gpu_bytes(self._device)
        _LOG.debug("base weights: %d bytes needed, %d free on the GPU", needed_bytes, spare)
        return spare >= needed_bytes + GPU_RESERVE_BYTES

    def _fits_host(self, needed_bytes: int) -> bool:
        if self._source is None:
            return True
        to_pin = needed_bytes - self._slabs.free_bytes
        return to_pin <= 0 or to_pin <= self._source.spare_host_bytes()

    def _keep_in(self, place: _Place, weights: Mapping[str, Tensor]) -> None:
        if place is _Place.GPU:
            self._keep_on_gpu(weights)
        elif place is _Place.HOST:
            self._keep_on_host(weights)
        else:
            self._uncopied.update({name: piece_bytes(tensor) for name, tensor in weights.items()})

    def _keep_on_gpu(self, weights: Mapping[str, Tensor]) -> None:
        try:
            copies = {name: tensor.clone() for name, tensor in weights.items()}
        except torch.OutOfMemoryError as error:
            if self._mode is BaseWeights.AUTO:
                self._keep_in(_Place.HOST if self._fits_host(_bytes(weights.values())) else _Place.SOURCE, weights)
                return
            raise OutOfMemory(
                "The base weights do not fit on the GPU beside the bound ones.",
                fix='Use base_weights="host" or "auto".',
                widget="base_weights",
            ) from error
        self._gpu.update(copies)

    def _keep_on_host(self, weights: Mapping[str, Tensor]) -> None:
        try:
            self._host.update(self._host_copies(weights, sum(map(piece_bytes, weights.values()))))
        except OutOfMemory as error:
            if self._source is None:
                raise
            _LOG.warning("%s Base weights are read again at each refit instead.", error.what)
            self._keep_in(_Place.SOURCE, weights)

    def _host_copies(self, weights: Mapping[str, Tensor], still_needed_bytes: int) -> dict[str, Tensor]:
        copies = {}
        with self._slabs.all_or_none():
            self._slabs.prepare(still_needed_bytes)
            # The largest first: what they leave of a slab is filled by the small ones.
            for name, tensor in sorted(weights.items(), key=lambda item: -piece_bytes(item[1])):
                copies[name] = self._slabs.take(tensor, still_needed_bytes).copy_(tensor, non_blocking=True)
                still_needed_bytes -= piece_bytes(tensor)
            torch.cuda.synchronize(self._device)
        return copies

    def _read(self, name: str, source: BaseSource) -> Tensor:
        try:
            tensor = source.read(name, self._device)
        except torch.OutOfMemoryError:
            return source.read(name, torch.device("cpu"))  # a refit that ran out of memory is rolled back from there
        self._copy_again(name, tensor)
        return tensor

    def _copy_again(self, name: str, tensor: Tensor) -> None:
        """Keeps what was just read where there is room by now."""
        waiting = sum(self._uncopied.values())
        if self._where(0) is _Place.GPU and self._fits_gpu(tensor.nbytes):
            self._gpu[name] = tensor
            del self._uncopied[name]
        elif self._device.type == "cuda" and self._fits_host(waiting):
            with suppress(OutOfMemory):
                self._host |= self._host_copies({name: tensor}, waiting)
                del self._uncopied[name]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
