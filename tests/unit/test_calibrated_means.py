"""Mean inputs from calibration on tiny real models: against every row that went into each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from tests.unit.fp8_simulation import layer_inputs
from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core import compile_transformer
from trt_core.backends.check import relative_l2
from trt_core.calibration import collect_input_ranges, feed_of
from trt_core.errors import InvalidOption
from trt_core.fp8_recipe import (
    Activations,
    Fp8Config,
    attached_recipe,
    block_linears,
    is_modulation,
    plan_recipe,
    same_recipe,
)
from trt_core.host import Silent
from trt_core.quantize import dequantize_, flux_architecture, quantize_fp8_
from trt_core.recipe_file import load_recipe, save_recipe

STATIC = Fp8Config(activations=Activations.STATIC)

ROUNDING = 1e-6
"""Relative error of a mean: sums are fp32."""


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_transformer()


def samples(model: FluxTransformer2DModel, number: int = 3) -> list[dict[str, Any]]:
    return [call_inputs(model, seed=seed, height=3 + seed, width=4) for seed in range(number)]


def means(model: FluxTransformer2DModel, calls: list[dict[str, Any]]) -> Mapping[str, Tensor]:
    feed = feed_of(calls, None)
    return collect_input_ranges(model, flux_architecture(model), feed, Silent(), allow_few=True).mean


def means_by_hand(model: FluxTransformer2DModel, calls: list[dict[str, Any]]) -> dict[str, Tensor]:
    """In fp64 over every row of every call, from what went into the last module of each linear."""
    return {name: rows.double().mean(0) for name, rows in layer_inputs(model, calls, which=-1).items()}


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
def test_means_are_those_of_all_rows_of_all_calls(adversarial: bool) -> None:
    """Calls of other sizes and of two pictures: each row counts once, whatever call it is in."""
    model = tiny_transformer(adversarial=adversarial)
    calls = [*samples(model), call_inputs(model, seed=7, batch=2, height=2, width=3, text=11)]
    found, expected = means(model, calls), means_by_hand(model, calls)
    assert set(found) == {name for name in block_linears(flux_architecture(model)) if not is_modulation(name)}
    for name, mean in found.items():
        assert (mean.dtype, mean.device.type) == (torch.float32, "cpu")
        assert mean.shape == expected[name].shape
        assert (mean - expected[name]).norm() <= ROUNDING * expected[name].norm(), name


def test_a_call_twice_as_long_weighs_twice_as_much() -> None:
    model = tiny_transformer()
    short, long = call_inputs(model, seed=1, height=3, width=4), call_inputs(model, seed=2, height=6, width=4)
    name = "double_blocks.0.img_attn.qkv"
    both, *alone = (means(model, calls)[name] for calls in ([short, long], [short], [long]))
    torch.testing.assert_close(both, (alone[0] + 2 * alone[1]) / 3)
    assert (alone[0] - alone[1]).norm() > 0.1 * both.norm()


def test_means_of_bf16_inputs_are_summed_in_fp32() -> None:
    model = tiny_transformer().bfloat16()
    found, expected = means(model, samples(model)), means_by_hand(model, samples(model))
    for name, mean in found.items():
        assert (mean - expected[name]).norm() <= ROUNDING * expected[name].norm(), name


def test_means_follow_a_lora_that_calibration_ran_with() -> None:
    model = tiny_transformer()
    plain = means(model, samples(model))
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=["proj_out", "to_q"], init_lora_weights=False))
    with_lora = means(model, samples(model))
    assert torch.equal(with_lora["double_blocks.0.img_attn.qkv"], plain["double_blocks.0.img_attn.qkv"])
    assert not torch.equal(with_lora["single_blocks.1.linear1"], plain["single_blocks.1.linear1"])


# -- in a recipe ------------------------------------------------------------------------------------------------------


def test_dynamic_with_calibration_takes_the_means_alone(model: FluxTransformer2DModel) -> None:
    recipe = quantize_fp8_(model, calibration=samples(model), progress=Silent())
    assert attached_recipe(model) is recipe
    assert recipe.config == Fp8Config()
    assert not recipe.input_amax
    assert set(recipe.input_mean) == recipe.activation_linears
    expected = layer_inputs(tiny_transformer(), samples(model))
    for name, mean in recipe.input_mean.items():
        torch.testing.assert_close(mean, expected[name].double().mean(0).float())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_static_has_the_same_means(model: FluxTransformer2DModel) -> None:
    dynamic = quantize_fp8_(tiny_transformer(), calibration=samples(model), progress=Silent())
    static = quantize_fp8_(model, STATIC, calibration=samples(model), progress=Silent())
    assert static.input_mean.keys() == dynamic.input_mean.keys() == static.input_amax.keys()
    assert all(torch.equal(mean, dynamic.input_mean[name]) for name, mean in static.input_mean.items())


def test_excluded_layers_have_no_means(model: FluxTransformer2DModel) -> None:
    recipe = quantize_fp8_(model, Fp8Config(exclude=("*.qkv",)), calibration=samples(model), progress=Silent())
    assert set(recipe.input_mean) == recipe.activation_linears
    assert not any(name.endswith("qkv") for name in recipe.input_mean)


def test_a_recipe_with_means_can_be_replanned_and_given_again(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    arch = flux_architecture(model)
    calibrated = quantize_fp8_(model, STATIC, calibration=samples(model), progress=Silent())
    dequantize_(model)
    config = Fp8Config(exclude=("*.linear2",))
    replanned = plan_recipe(arch, config, input_mean=calibrated.input_mean)
    given = quantize_fp8_(model, recipe=load_recipe(save_recipe(tmp_path / "means.safetensors", replanned, arch), arch))
    assert same_recipe(given, replanned)


def test_dynamic_calibration_needs_more_than_a_call_too(model: FluxTransformer2DModel) -> None:
    with pytest.raises(InvalidOption, match="single call"):
        quantize_fp8_(model, calibration=samples(model)[:1], progress=Silent())
    assert attached_recipe(model) is None


def test_a_dynamic_recipe_with_means_runs_compiled(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    quantize_fp8_(model, calibration=samples(model), progress=Silent())
    exact = run_diffusers(tiny_transformer(), call_inputs(model))
    compile_transformer(model, backend="eager", cache_folder=str(tmp_path), progress=Silent())
    error = relative_l2(run_diffusers(model, call_inputs(model)), exact)
    assert 0.004 < error < 0.1
