"""Pinned host memory, handed out piece by piece: what the GPU copies from and to at full speed."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from .errors import OutOfMemory

_ALIGNMENT_BYTES = 256
_SLAB_BYTES = 2**30
"""Host memory is pinned in slabs of a power of two, because PyTorch's pinned allocator rounds every block up to one:
a 132 MB weight by itself would take 256 MB."""
_PAGE_BYTES = mmap.PAGESIZE
_PINNING_THREADS = 3
"""Most of pinning is the system's zeroing of pages, which several threads do side by side."""


class HostSlabs:
    """Pinned host memory, kept for the next use: pinning takes 0.1 (Linux) to 0.7 s per GiB."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._used: list[int] = []

    def take(self, like: Tensor, still_needed_bytes: int = _SLAB_BYTES) -> Tensor:
        """A pinned tensor of the shape and dtype of `like`, valid until `reset`. Raises `OutOfMemory`.

        `still_needed_bytes` is all that will be taken, this piece included: no slab is made much larger than that.
        """
        size = piece_bytes(like)
        # The first slab with room: small weights fill what large ones leave, else a tenth of the memory would be lost.
        index = next((i for i, used in enumerate(self._used) if used + size <= self._slabs[i].numel()), None)
        if index is None:
            self._slabs.append(_pinned(_slab_bytes(size, still_needed_bytes)))
            self._used.append(0)
            index = len(self._slabs) - 1
        start = self._used[index]
        self._used[index] += size
        piece = self._slabs[index][start : start + like.numel() * like.element_size()]
        return piece.view(like.dtype).view(like.shape)

    def prepare(self, needed_bytes: int) -> None:
        """Pins what `needed_bytes` need beside what is free, several slabs at a time, or nothing: `OutOfMemory`."""
        missing, sizes = needed_bytes - self.free_bytes, []
        while missing > 0:
            sizes.append(_slab_bytes(1, missing))
            missing -= sizes[-1]
        with ThreadPoolExecutor(_PINNING_THREADS, "trt_core pinning") as pool:
            slabs = list(pool.map(_pinned, sizes))
        self._slabs += slabs
        self._used += [0] * len(slabs)

    def reset(self) -> None:
        """Everything handed out is free again; the memory stays pinned."""
        self._used = [0] * len(self._slabs)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """What is taken inside is given back, and unpinned, if an error leaves it."""
        before, complete = list(self._used), False
        try:
            yield
            complete = True
        finally:
            if not complete:
                del self._slabs[len(before) :]
                self._used = before
                empty_cache()

    @property
    def free_bytes(self) -> int:
        """What is pinned and not handed out."""
        return sum(slab.numel() for slab in self._slabs) - sum(self._used)


def empty_cache() -> None:
    """Gives memory back that PyTorch keeps pinned for later: it gives none back by itself."""
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # since torch 2.10
    if torch.cuda.is_available() and torch.cuda.is_initialized() and empty_host_cache is not None:
        empty_host_cache()


def piece_bytes(like: Tensor) -> int:
    """What a piece takes of a slab."""
    return -(-like.numel() * like.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _slab_bytes(piece: int, still_needed: int) -> int:
    """A power of two that the rest fills, or the smallest that holds the piece; a larger piece has its own slab."""
    if piece > _SLAB_BYTES:
        return piece
    filled = 1 << (max(still_needed, 1).bit_length() - 1)
    return min(_SLAB_BYTES, max(filled, 1 << (piece - 1).bit_length()))


def _pinned(size_bytes: int) -> Tensor:
    if sys.platform == "linux":
        # A limit on locked memory, or no CUDA (an AssertionError of PyTorch's): PyTorch's own way then, and its error.
        with suppress(RuntimeError, OSError, AssertionError):
            return _registered(size_bytes)
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise OutOfMemory(
            f"{size_bytes / 2**30:.1f} GiB of host memory for base weights could not be pinned.",
            fix='Close other programs, or use base_weights="gpu" where the GPU has room.',
            widget="base_weights",
        ) from error


class _Memory(mmap.mmap):
    """Unpins itself just before the memory goes: not with the slab, whose pieces live on as a model's parameters."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None and not sys.is_finalizing():
            _unregister(self.address)


def _registered(size_bytes: int) -> Tensor:
    """Memory in huge pages where the system has them, touched in parallel, then pinned in one call.

    Pinning by CUDA touches page after page on one thread, under a lock of the driver: 0.68 s per GiB on an H200's host,
    where this takes 0.12 s.
    """
    memory = _Memory(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    slab = torch.frombuffer(memory, dtype=torch.uint8)
    slab[::_PAGE_BYTES].zero_()
    address = slab.data_ptr()
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))
    except RuntimeError:
        _forget_cuda_error()
        raise
    memory.address = address
    return slab


def _unregister(address: int) -> None:
    """Before the memory goes: an address that is pinned still could not be pinned again."""
    torch.cuda.synchronize()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def _forget_cuda_error() -> None:
    """CUDA hands the last error to whoever asks next: here, and not in the next kernel."""
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return
