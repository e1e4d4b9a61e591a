"""Peaks of host and GPU memory of the whole machine over what it held before: nothing a library allocates escapes."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

_INTERVAL_SECONDS = 0.02


class MemoryPeaks:
    """Samples used memory in a thread. Host: MemTotal - MemAvailable, child processes and pinned memory included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_before = host_used_bytes()
        self.host_bytes, self.gpu_bytes = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeaks:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self.host_bytes = max(self.host_bytes, host_used_bytes() - self._host_before)
            free, total = torch.cuda.mem_get_info(self._device)
            self.gpu_bytes = max(self.gpu_bytes, total - free)


def host_used_bytes() -> int:
    """Memory in use on this machine, page cache not counted."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kib["MemTotal"] - kib["MemAvailable"]) * 1024
