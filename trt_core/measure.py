"""Times work on this machine's device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
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


def in_turns(
    calls: Mapping[_Name, Callable[[], object]], device: torch.device, turns: int, turn_ms: float
) -> dict[_Name, float]:
    """Milliseconds of one call of each, the median of `turns`; a turn repeats a call for about `turn_ms`.

    On a GPU turn follows turn without a pause, so that its clocks are those of a GPU under load.
    """
    if device.type != "cuda":
        return {name: median_milliseconds(call, device, turns, 1) for name, call in calls.items()}
    with torch.cuda.device(device):
        counts = {name: max(1, round(turn_ms / _turn(call, 2)())) for name, call in calls.items()}
        taken: dict[_Name, list[Callable[[], float]]] = {name: [] for name in calls}
        for turn in range(turns):
            for name in list(calls)[:: 1 if turn % 2 else -1]:
                taken[name].append(_turn(calls[name], counts[name]))
    return {name: sorted(ms() for ms in found)[len(found) // 2] for name, found in taken.items()}


def _turn(call: Callable[[], object], count: int) -> Callable[[], float]:
    """Queues `count` calls; what is returned waits for them and says how many milliseconds one took."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(count):
        call()
    after.record()

    def milliseconds() -> float:
        after.synchronize()
        return before.elapsed_time(after) / count

    return milliseconds


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
