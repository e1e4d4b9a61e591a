"""Our FLUX against diffusers' FluxTransformer2DModel: every variant, plain and adversarial weights, fp32 and bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_flux import (
    BF16_RATIO_BOUND,
    FP32_BOUND,
    bfl_weights,
    call_inputs,
    exact_inputs,
    fp32_error,
    loaded,
    run,
    run_diffusers,
    tiny_transformer,
)
from trt_core.backends.check import relative_l2

VARIANTS = {
    "dev": {},
    "schnell": {"guidance": False},
    "fill": {"in_channels": 384, "out_channels": 64},
    "canny": {"in_channels": 128, "out_channels": 64},
    "three heads": {"heads": 3, "head_dim": 16},
    "wide heads": {"heads": 1, "head_dim": 128, "double": 1, "single": 1},
    "no double blocks": {"double": 0, "single": 2},
    "no single blocks": {"double": 2, "single": 0},
}
SIZES = {
    "odd": {"height": 3, "width": 11, "text": 5},
    "one text token": {"text": 1},
    "batch 2": {"batch": 2},
    "batch 3, tall": {"batch": 3, "height": 9, "width": 2},
}


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equals_diffusers_in_fp32(variant: dict[str, Any], adversarial: bool, tmp_path: Path) -> None:
    model = tiny_transformer(**variant, adversarial=adversarial)
    assert fp32_error(model, bfl_weights(model), tmp_path) <= FP32_BOUND


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_diffusers_at_other_sizes(sizes: dict[str, int], tmp_path: Path) -> None:
    model = tiny_transformer(adversarial=True)
    assert fp32_error(model, bfl_weights(model), tmp_path, **sizes) <= FP32_BOUND


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
@pytest.mark.parametrize("variant", [{}, {"guidance": False, "heads": 3, "head_dim": 16}], ids=["dev", "schnell"])
def test_bf16_is_as_close_to_fp32_as_eager_diffusers(
    variant: dict[str, Any], adversarial: bool, tmp_path: Path
) -> None:
    # Rounded first, so that both dtypes compute the same function and only the arithmetic differs.
    rounded = tiny_transformer(**variant, adversarial=adversarial).to(torch.bfloat16)
    inputs = call_inputs(rounded, batch=2)
    eager = run_diffusers(rounded, inputs)
    seen = run(loaded(bfl_weights(rounded), tmp_path), inputs)
    reference = run_diffusers(rounded.float(), exact_inputs(inputs))
    assert seen.dtype is torch.bfloat16
    assert relative_l2(seen, reference) <= BF16_RATIO_BOUND * relative_l2(eager, reference)


def test_adversarial_weights_are_adversarial() -> None:
    """They would prove nothing if outliers, tails and gains had been lost on the way."""
    model = tiny_transformer(adversarial=True)
    embedded = model.x_embedder(call_inputs(model)["hidden_states"]).abs().mean(dim=(0, 1))
    kurtosis = (w := model.transformer_blocks[0].ff.net[2].weight).pow(4).mean() / w.square().mean().square()
    assert embedded[:8].min() > 10 * embedded[8:].max()
    assert kurtosis > 5, "a normal distribution has 3"
    assert model.transformer_blocks[0].attn.norm_q.weight.mean() > 2.5


def test_output_is_of_the_models_size(tmp_path: Path) -> None:
    model = tiny_transformer(in_channels=384, out_channels=64)
    assert run(loaded(bfl_weights(model), tmp_path), call_inputs(model, batch=2)).shape == (2, 40, 64)
