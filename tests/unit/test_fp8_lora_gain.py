"""A LoRA changes an FP8 model by as much as it changes the fp32 one, however small it is beside E4M3's steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.fp8_lora_gain import lora_gain, rounded_bases
from tests.unit.fp8_simulation import Scheme, compiled_fp8
from tests.unit.tiny_flux import call_inputs, tiny_transformer

WIDE = {"heads": 4, "head_dim": 64}


def gain(cache: Path, size: float, loras: int, *, per_row: bool = True, rounded_first: bool = False) -> float:
    exact, model = tiny_transformer(**WIDE), tiny_transformer(**WIDE)
    if rounded_first:
        model = rounded_bases(model, per_row)
    calls = [call_inputs(exact, height=8, width=8, text=16, seed=seed) for seed in range(3)]
    return lora_gain(compiled_fp8(model, Scheme(per_row), cache), exact, calls, size, loras)


@pytest.mark.parametrize("per_row", [True, False], ids=["row", "tensor"])
@pytest.mark.parametrize(("size", "loras"), [(0.005, 12), (0.01, 8), (0.05, 3)])
def test_the_gain_of_a_small_lora_is_one(size: float, loras: int, per_row: bool, tmp_path: Path) -> None:
    assert 0.97 <= gain(tmp_path, size, loras, per_row=per_row) <= 1.03


@pytest.mark.parametrize(("size", "most"), [(0.005, 0.45), (0.01, 0.7)])
def test_merging_into_the_rounded_weight_would_lose_it(size: float, most: float, tmp_path: Path) -> None:
    """Mutation: bases that are FP8 already are what everyone merges into who quantizes first."""
    assert gain(tmp_path, size, 3, rounded_first=True) < most
