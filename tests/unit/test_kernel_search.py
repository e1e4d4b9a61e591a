"""The search for kernels: what it tries, in which order, and where it ends; times are those of a made-up GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks import kernel_search
from benchmarks.kernel_search import best, first_kernels, search, shown
from trt_core.flux.cublaslt_kernels import CLUSTERS, OPTIONS, TILES, Kernel

BEST = Kernel("128x160", "4x2", 3)


def distance(kernel: Kernel) -> float:
    """1 for `BEST`, more the less a kernel resembles it; some do not exist."""
    return 1 + 0.3 * (kernel.tile != BEST.tile) + 0.02 * (kernel.cluster != BEST.cluster) + 0.01 * (
        kernel.option != BEST.option
    )  # fmt: skip


class Gpu:
    def __init__(self) -> None:
        self.asked: list[Kernel] = []

    def __call__(self, kernels: Sequence[Kernel]) -> dict[Kernel, float]:
        assert 1 <= len(kernels) <= 6
        self.asked += kernels
        return {kernel: distance(kernel) for kernel in kernels if kernel.tile != "384x96"}


def test_tile_then_cluster_then_option() -> None:
    gpu = Gpu()
    found = search(gpu, lambda: True)
    assert best(found, 1) == [BEST]
    assert len(gpu.asked) == len(set(gpu.asked)), "nothing twice"
    assert gpu.asked[: 4 * len(TILES)] == first_kernels()
    assert {k.cluster for k in gpu.asked if k.tile == BEST.tile} == set(CLUSTERS)
    assert {k.option for k in gpu.asked if (k.tile, k.cluster) == (BEST.tile, BEST.cluster)} == set(OPTIONS)
    assert not [k for k in found if k.tile == "384x96"]


def test_it_ends_in_time() -> None:
    gpu, left = Gpu(), iter([True, True, False, False, False])
    assert len(search(gpu, lambda: next(left))) == len(gpu.asked) == 12


def test_where_no_kernel_can_be_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        kernel_search.main(["--products", "linear2"])
    assert ended.value.code == 1
    assert "Nothing to search here: no NVIDIA GPU." in capsys.readouterr().err


def test_a_line() -> None:
    line = {"name": "linear2", "measured": 40, "ms": {"cuBLASLt 128x160, 2x1, 1": 0.59, "cuBLASLt's choice": 0.6}}
    words = shown(line).removeprefix("linear2").strip()
    assert words == "0.6000 ms, 40 measured: cuBLASLt 128x160, 2x1, 1 0.983; cuBLASLt's choice 1.000"
