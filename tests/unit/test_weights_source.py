"""Refit with bases that the program has anyway: the same bits from any past, evictions and failures included."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import DOUBLE_NAMES, SINGLE_NAMES, base_weights, bound, copied, differing, one, stack
from tests.unit.bound_weights import random_lora as lora
from tests.unit.test_weights_failures import Failing
from trt_core.config import BaseWeights
from trt_core.errors import OutOfMemory
from trt_core.weights import BoundWeights

A = lora("a", DOUBLE_NAMES, 4, seed=1)
B = lora("b", (*DOUBLE_NAMES[2:], *SINGLE_NAMES[:1]), 32, seed=2)
C = lora("c", SINGLE_NAMES[1:], 7, seed=3)


class Originals:
    """The model's weights as a program keeps them for itself."""

    def __init__(self) -> None:
        self._weights = base_weights()
        self.reads = 0

    def read(self, name: str, device: torch.device) -> Tensor:
        self.reads += 1
        return self._weights[name].to(device, copy=True)

    def spare_gpu_bytes(self) -> int:
        return 10**12

    def spare_host_bytes(self) -> int:
        return 0


def with_source(mode: BaseWeights) -> tuple[BoundWeights, Originals]:
    source = Originals()
    return BoundWeights(base_weights(), mode, source=source), source


@pytest.mark.parametrize("mode", [BaseWeights.GPU, BaseWeights.AUTO])
def test_fifty_random_switches_and_evictions_drift_by_nothing(mode: BaseWeights) -> None:
    choices, (weights, _) = random.Random(5), with_source(mode)
    for _ in range(50):
        loras = choices.sample((A, B, C), choices.randint(0, 3))
        new = stack(*((each, choices.choice((1.0, 0.35, -0.8, 0.0))) for each in loras))
        fresh = bound()
        fresh.refit(new)
        weights.refit(new)
        assert differing(weights, copied(fresh)) == []
        weights.free_base_gpu(choices.choice((0, 1, 5000, 1e32)))
        assert differing(weights, copied(fresh)) == [], "an eviction touches no bound weight"
        assert all(torch.equal(weights.base(name), tensor) for name, tensor in base_weights().items())
    weights.restore()
    assert differing(weights, base_weights()) == []
    assert weights.base_gpu_bytes == 0


def test_copies_are_counted_and_freed() -> None:
    weights, source = with_source(BaseWeights.GPU)
    weights.refit(stack((A, 1.0)))
    held = sum(weights.tensors[name].nbytes for name in A.patches)
    assert weights.base_gpu_bytes == held
    assert weights.free_base_gpu(1e32) == held
    assert weights.base_gpu_bytes == source.reads == 0
    weights.refit(stack((A, 0.5)))
    assert (weights.base_gpu_bytes, source.reads) == (held, len(A.patches)), "what was read is kept again"


@pytest.mark.parametrize("mode", [BaseWeights.GPU, BaseWeights.AUTO])
def test_a_failed_refit_is_rolled_back_from_the_source(mode: BaseWeights) -> None:
    weights, _ = with_source(mode)
    weights.refit(stack((A, 0.8)))
    before = copied(weights)
    weights.free_base_gpu(1e32)
    with pytest.raises(OutOfMemory):
        weights.refit(stack((B, 1.0)) | one(SINGLE_NAMES[2], Failing(torch.OutOfMemoryError)))
    assert differing(weights, before) == []
    weights.restore()
    assert differing(weights, base_weights()) == []
