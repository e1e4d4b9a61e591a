"""Times of this device: what a GPU waits for before it is timed, and a clock elsewhere."""

from __future__ import annotations

import time

import pytest
import torch

from trt_core.measure import median_milliseconds, settled_milliseconds, wait_cycles


@pytest.mark.parametrize("queued_seconds", [0.0, 1e-4, 0.02, 0.1])
def test_a_gpu_waits_longer_than_queuing_takes(queued_seconds: float) -> None:
    """At 2 GHz, more than any of these GPUs; a slower clock waits longer."""
    assert queued_seconds + 1e-3 <= wait_cycles(queued_seconds) / 2e9 < 1.5 * queued_seconds + 2e-3


def test_it_never_waits_for_long() -> None:
    assert wait_cycles(30.0) == 0.25 * 2e9


def test_a_clock_on_the_cpu() -> None:
    calls: list[float] = []

    def run() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.01 if len(calls) > 2 else 0.2)

    assert 10 <= median_milliseconds(run, torch.device("cpu"), repeats=3, warmup=2) < 100
    assert len(calls) == 5


def test_each_of_several_on_the_cpu() -> None:
    found = settled_milliseconds(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, torch.device("cpu"), 1.0, 1.0
    )
    assert 1 <= found["short"] < 10 <= found["long"] < 100
