"""Peaks of host and GPU memory that one scenario causes, child processes and pinned memory included."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

_INTERVAL_SECONDS = 0.05
_PROBE_BYTES = 2**28
_NAMES = re.compile(r"benchmarks\.\w+|tensorrt_worker|compile_worker")
"""What of a command line tells the processes of a benchmark apart."""


class Share(NamedTuple):
    """One process's part of the host memory. Bytes are proportional: a page of several processes is divided among them.

    `anonymous_bytes` is heap and stacks; the rest of `bytes` is files (libraries) and memory shared with a driver.
    """

    process: str
    bytes: int
    anonymous_bytes: int


class MemoryPeaks:
    """Samples in a thread. `host_bytes`: proportional set size of this process and its children; `gpu_bytes`: all
    memory in use on the device, CUDA contexts and builder processes included. `host_shares` and `host_peak_seconds`
    say whose memory the host's peak was, the largest first, and when it was, from the first sample."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.host_bytes, self.gpu_bytes = 0, 0
        self.host_shares: list[Share] = []
        self.host_peak_seconds = 0.0
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
        started = time.perf_counter()
        while not self._stop.wait(_INTERVAL_SECONDS):
            shares = shares_of(os.getpid())
            if (host_bytes := sum(share.bytes for share in shares)) > self.host_bytes:
                self.host_bytes, self.host_shares = host_bytes, shares
                self.host_peak_seconds = time.perf_counter() - started
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


def shares_of(pid: int) -> list[Share]:
    """Of the process and all its descendants, the largest first."""
    shares = [share for member in _family(pid) if (share := _share(member)) is not None]
    return sorted(shares, key=lambda share: -share.bytes)


def _share(pid: int) -> Share | None:
    """None for a process that has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.endswith(" kB")}
    known = _NAMES.search(" ".join(words))
    name = known.group() if known else Path(words[0]).name
    return Share(name, *(kilobytes[field] * 1024 for field in ("Pss", "Pss_Anon")))


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
    share = _share(pid)
    return 0 if share is None else share.bytes
