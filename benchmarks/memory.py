"""Peaks of host and GPU memory that one scenario causes, child processes and pinned memory included."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch

_INTERVAL_SECONDS = 0.05
_PROBE_BYTES = 2**28


class MemoryPeaks:
    """Samples in a thread. `host_bytes`: proportional set size of this process and its children; `gpu_bytes`: all
    memory in use on the device, CUDA contexts and builder processes included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.host_bytes, self.gpu_bytes = 0, 0
        self.counts_pinned = _counts_pinned()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeaks:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def host_bytes_without(self, pinned_bytes: int) -> int:
        """The host peak less `pinned_bytes` of weights, where this system counts pinned memory to the process."""
        return max(0, self.host_bytes - pinned_bytes) if self.counts_pinned else self.host_bytes

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self.host_bytes = max(self.host_bytes, sum(_pss_bytes(pid) for pid in _family(os.getpid())))
            free, total = torch.cuda.mem_get_info(self._device)
            self.gpu_bytes = max(self.gpu_bytes, total - free)


def _counts_pinned() -> bool:
    """Whether memory pinned by CUDA shows in this process's set size; drivers differ."""
    before = _pss_bytes(os.getpid())
    probe = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    probe.fill_(1)
    time.sleep(0.05)
    grown = _pss_bytes(os.getpid()) - before
    del probe
    return grown > _PROBE_BYTES // 2


def _family(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += _family(int(child))
    return found


def _pss_bytes(pid: int) -> int:
    """Proportional set size: shared libraries are counted once over all processes that map them."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)
