"""A LoRA changes an FP8 model by as much as it changes the fp32 one, however small it is beside E4M3's steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import one
from tests.unit.fp8_bound import ARCH, CPU, GRANULARITIES, recipe, scale_of
from tests.unit.fp8_lora_gain import lora_gain, rounded_bases
from tests.unit.fp8_simulation import Scheme, compiled_fp8
from tests.unit.tiny_flux import call_inputs, tiny_transformer
from trt_core.config import BaseWeights
from trt_core.fp8_weights import Fp8Weights, base_place
from trt_core.lora.changes import Difference

WIDE = {"heads": 4, "head_dim": 64}


def gain(cache: Path, size: float, loras: int, *, per_row: bool = True, rounded_first: bool = False) -> float:
    exact, model = tiny_transformer(**WIDE), tiny_transformer(**WIDE)
    if rounded_first:
        model = rounded_bases(model, per_row)
    calls = [call_inputs(exact, height=8, width=8, text=16, seed=seed) for seed in range(3)]
    return lora_gain(compiled_fp8(model, Scheme(per_row), cache), exact, calls, size, loras)


@GRANULARITIES
@pytest.mark.parametrize(("size", "loras"), [(0.005, 12), (0.01, 8), (0.05, 3)])
def test_the_gain_of_a_small_lora_is_one(size: float, loras: int, per_row: bool, tmp_path: Path) -> None:
    assert 0.97 <= gain(tmp_path, size, loras, per_row=per_row) <= 1.03


@pytest.mark.parametrize(("size", "most"), [(0.005, 0.65), (0.01, 0.8)])
def test_merging_into_the_rounded_weight_would_lose_it(size: float, most: float, tmp_path: Path) -> None:
    """Mutation: bases that are FP8 already are what everyone merges into who quantizes first. What the LoRA does to
    modulations arrives all the same, beside them."""
    assert gain(tmp_path, size, 3, rounded_first=True) < most


# -- in one weight ----------------------------------------------------------------------------------------------------


def _gain(merged_fp8: Tensor, base_fp8: Tensor, delta: Tensor) -> float:
    return float(((merged_fp8 - base_fp8) * delta).sum() / delta.square().sum())


def _wide_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(1024, 1024, generator=generator) / 32).bfloat16()
    delta = torch.randn(1024, 16, generator=generator) @ torch.randn(16, 1024, generator=generator)
    return base, delta / delta.square().mean().sqrt() * base.float().square().mean().sqrt()


@GRANULARITIES
@pytest.mark.parametrize("size", [0.005, 0.01, 0.05])
def test_the_gain_of_a_change_is_one(size: float, per_row: bool) -> None:
    """In the weight itself, where 0.5 % of it is a fraction of E4M3's step."""
    base, delta = _wide_weight()
    weights = _only(base, per_row)
    before = _dequantized(weights)
    weights.refit(one(_ONLY, Difference(delta * size)))
    assert 0.97 <= _gain(_dequantized(weights), before, delta * size) <= 1.03


@pytest.mark.parametrize(
    ("per_row", "size", "most"),
    [(True, 0.005, 0.4), (True, 0.01, 0.5), (True, 0.05, 0.97), (False, 0.005, 0.5), (False, 0.01, 0.6)],
)
def test_a_merge_into_the_rounded_weight_would_lose_it(per_row: bool, size: float, most: float) -> None:
    """Mutation: the same bound finds the mistake that everyone else makes. (With one scale for all, a change of 5 %
    moves that scale and with it every number of the grid, so there is nothing to find.)"""
    base, delta = _wide_weight()
    rounded = _dequantized(_only(base, per_row))
    weights = _only(rounded, per_row)
    before = _dequantized(weights)
    weights.refit(one(_ONLY, Difference(delta * size)))
    assert _gain(_dequantized(weights), before, delta * size) < most


_ONLY = "single_blocks.0.linear2.weight"


def _only(base: Tensor, per_row: bool) -> Fp8Weights:
    chosen = recipe(per_row)
    return Fp8Weights([(_ONLY, base)], chosen, base_place(BaseWeights.AUTO, ARCH, chosen, CPU, given_there=True), CPU)


def _dequantized(weights: Fp8Weights) -> Tensor:
    return weights.tensors[_ONLY].float() * weights.tensors[scale_of(_ONLY)]
