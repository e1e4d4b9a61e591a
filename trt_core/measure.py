"""Times work on this machine's device."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from statistics import mean
from typing import TypeVar

import torch

_Name = TypeVar("_Name")


def median_milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 10, warmup: int = 3) -> float:
    """Median time of `run()` in milliseconds after warm-up: CUDA events on a GPU, a clock elsewhere.

    A GPU's time alone, however long Python takes to launch it: steps run from a CUDA graph.
    """
    queued_seconds = min((_seconds(run) for _ in range(warmup)), default=0.0)
    times = _gpu_times(run, device, repeats, queued_seconds) if device.type == "cuda" else _cpu_times(run, repeats)
    return sorted(times)[len(times) // 2]


def settled_milliseconds(
    calls: Mapping[_Name, Callable[[], object]], device: torch.device, settle_ms: float, taken_ms: float,
    hopeless: float = math.inf,
) -> dict[_Name, float]:  # fmt: skip
    """Milliseconds of one call of each while the GPU does nothing else, each repeated for `settle_ms` before it counts.

    At its power limit a GPU's clocks depend on what the work takes, so this compares energy. An H200 that multiplies
    matrices reaches its clocks after 100 ms: 0.333, 0.336, 0.346, 0.364 and from then on 0.382 ms in spans of 20 ms.
    From one such call to the next it has less to change. The first call comes once more at the end. Left out are those
    that take more than `hopeless` times the first one's time at the clocks that they find.
    """
    if device.type != "cuda":
        return {name: median_milliseconds(call, device, 3, 1) for name, call in calls.items()}
    spans: dict[_Name, list[float]] = {}
    with torch.cuda.device(device):
        for name in [*calls, *list(calls)[:1]]:
            once = _span(calls[name], 3)
            if spans and once > hopeless * next(iter(spans.values()))[0]:
                continue
            _span(calls[name], math.ceil(settle_ms / once))
            spans.setdefault(name, []).append(_span(calls[name], math.ceil(taken_ms / once)))
    return {name: mean(found) for name, found in spans.items()}


def _span(call: Callable[[], object], count: int) -> float:
    """Milliseconds of one call of `count` without a pause."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(count):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / count


def _gpu_times(run: Callable[[], object], device: torch.device, repeats: int, queued_seconds: float) -> list[float]:
    with torch.cuda.device(device):
        # The GPU waits until all repeats are queued. Else it waits for Python between them, and a block of many small
        # launches counts as slow on a slow host (measured: 2.7 ms for a double block in FP8 that takes 1.3 ms).
        torch.cuda._sleep(wait_cycles(queued_seconds * repeats))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def _cpu_times(run: Callable[[], object], repeats: int) -> list[float]:
    return [_seconds(run) * 1000 for _ in range(repeats)]


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def wait_cycles(queued_seconds: float) -> int:
    """Clock cycles of a GPU that last longer than queuing takes, at most a quarter of a second at 2 GHz."""
    return int(min(1.5 * queued_seconds + 1e-3, 0.25) * 2e9)
