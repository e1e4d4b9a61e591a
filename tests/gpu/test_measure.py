"""A GPU's time is its own: a slow host does not count."""

from __future__ import annotations

import time

import torch

from trt_core.measure import median_milliseconds

DEVICE = torch.device("cuda", 0)


def test_python_between_launches_is_not_measured() -> None:
    x = torch.zeros(1024, device=DEVICE)

    def run() -> None:
        for _ in range(4):
            time.sleep(1e-3)
            x.add_(1)

    assert median_milliseconds(run, DEVICE) < 1
