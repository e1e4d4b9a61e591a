"""Times work on this machine's device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch


def median_milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 10, warmup: int = 3) -> float:
    """Median time of `run()` in milliseconds after warm-up: CUDA events on a GPU, a clock elsewhere.

    All repeats are queued before the first is waited for, so that a GPU's time is not mixed with Python's.
    """
    for _ in range(warmup):
        run()
    times = _gpu_times(run, device, repeats) if device.type == "cuda" else _cpu_times(run, repeats)
    return sorted(times)[len(times) // 2]


def _gpu_times(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def _cpu_times(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1000)
    return times
