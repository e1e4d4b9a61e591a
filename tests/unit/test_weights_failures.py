"""A refit that fails leaves the weights from before, bit for bit, and the next one works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import (
    DOUBLE_NAMES,
    SINGLE_NAMES,
    base_weights,
    bound,
    copied,
    differing,
    one,
    random_lora,
    stack,
    versions,
)
from trt_core.errors import LoraMismatch, OutOfMemory, TRTError
from trt_core.lora.changes import Additive
from trt_core.weights import BoundWeights, WeightPatches

A = random_lora("a", DOUBLE_NAMES, 4, seed=1)
B = random_lora("b", (*DOUBLE_NAMES[:2], *SINGLE_NAMES[:2]), 8, seed=2)
LAST = SINGLE_NAMES[2]


@dataclass(frozen=True, slots=True, eq=False)
class Failing(Additive):
    """A change that cannot be computed, for one reason or another."""

    error: type[BaseException]
    scale: float = 1.0

    def delta(self, device: torch.device | str) -> Tensor:
        raise self.error("provoked")


def failing_after_b(error: type[BaseException]) -> dict[str, WeightPatches]:
    """B on four weights, then a change that fails: written last, when everything else is merged already."""
    return stack((B, 1.0)) | one(LAST, Failing(error))


def refit_fails(weights: BoundWeights, new: Mapping[str, WeightPatches], expected: type[BaseException]) -> None:
    before = versions(weights)
    with pytest.raises(expected):
        weights.refit(new)
    assert sum(v != before[n] for n, v in versions(weights).items()) >= 5, "it was to fail in the middle"


REASONS = [(torch.OutOfMemoryError, OutOfMemory), (KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, RuntimeError)]


@pytest.mark.parametrize(("provoked", "raised"), REASONS)
def test_failure_under_a_lora_keeps_that_lora(provoked: type[BaseException], raised: type[BaseException]) -> None:
    weights = bound()
    weights.refit(stack((A, 0.8)))
    before = copied(weights)
    refit_fails(weights, failing_after_b(provoked), raised)
    assert differing(weights, before) == []
    assert weights.touched == A.patches.keys()
    assert all(torch.equal(weights.base(name), tensor) for name, tensor in base_weights().items())


@pytest.mark.parametrize(("provoked", "raised"), REASONS)
def test_failure_without_a_lora_keeps_the_base(provoked: type[BaseException], raised: type[BaseException]) -> None:
    weights = bound()
    refit_fails(weights, failing_after_b(provoked), raised)
    assert differing(weights, base_weights()) == []
    assert weights.touched == frozenset()


def test_after_a_failure_every_refit_is_exact() -> None:
    for following in (stack((A, 0.8)), stack((B, 1.0)), {}):
        weights, clean = bound(), bound()
        weights.refit(stack((A, 0.8)))
        refit_fails(weights, failing_after_b(torch.OutOfMemoryError), OutOfMemory)
        weights.refit(following)
        clean.refit(following)
        assert differing(weights, copied(clean)) == []
        assert weights.touched == following.keys()


def test_a_weight_put_back_is_merged_anew_at_the_next_refit() -> None:
    """It was merged on the CPU, whose sums may round otherwise than the GPU's."""
    weights = bound()
    weights.refit(stack((A, 0.8)))
    assert not weights.needs(stack((A, 0.8)))
    refit_fails(weights, failing_after_b(torch.OutOfMemoryError), OutOfMemory)
    report = weights.refit(stack((A, 0.8)))
    assert report.merged == len(A.patches), "restored and merged ones alike were written by the failed refit"


def test_out_of_memory_says_what_to_do() -> None:
    weights = bound()
    with pytest.raises(OutOfMemory, match=r'weights from before are back\. Use base_weights="host"') as caught:
        weights.refit(one(LAST, Failing(torch.OutOfMemoryError)))
    assert caught.value.widget == "base_weights"
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_an_unknown_weight_changes_nothing() -> None:
    weights = bound()
    weights.refit(stack((A, 1.0)))
    before, written = copied(weights), versions(weights)
    unknown = one("double_blocks.7.img_attn.qkv.weight", Failing(RuntimeError))
    with pytest.raises(LoraMismatch, match=r"changes double_blocks\.7\.img_attn\.qkv\.weight"):
        weights.refit(stack((B, 1.0)) | unknown)
    assert versions(weights) == written
    assert differing(weights, before) == []


def test_bases_in_use_cannot_be_forgotten() -> None:
    weights = bound()
    weights.refit(stack((A, 1.0)))
    with pytest.raises(TRTError, match="Restore the base first"):
        weights.forget_bases()
    weights.restore()
    weights.forget_bases()
    weights.refit(stack((A, 1.0)))
    weights.restore()
    assert differing(weights, base_weights()) == []
