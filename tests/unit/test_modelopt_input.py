"""What ModelOpt's own configs become, and that ours loses no layer. Every model here is quantized by real ModelOpt."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core.errors import InvalidOption, UnsupportedModel
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import (
    Activations,
    Fp8Config,
    Granularity,
    block_linears,
    diffusers_linears,
    left_in_bf16,
    plan_recipe,
)
from trt_core.modelopt_input import is_modelopt_quantized, modelopt_config, modelopt_recipe

mtq = pytest.importorskip("modelopt.torch.quantization")
STATIC_TENSOR = Fp8Config(Granularity.TENSOR, Activations.STATIC)


def loop(model: FluxTransformer2DModel) -> None:
    for seed in range(2):
        run_diffusers(model, call_inputs(model, seed=seed))


def quantized(config: dict[str, Any], forward_loop: Any = loop) -> FluxTransformer2DModel:
    return mtq.quantize(tiny_transformer(), config, forward_loop)


@pytest.fixture(scope="module")
def arch() -> FluxArchitecture:
    return FluxArchitecture.from_diffusers_config(dict(tiny_transformer().config))


def enabled(model: FluxTransformer2DModel, kind: str) -> set[str]:
    return {
        name.removesuffix(f".{kind}")
        for name, module in model.named_modules()
        if name.endswith(f".{kind}") and module.is_enabled
    }


def test_a_plain_model_is_not_quantized() -> None:
    assert not is_modelopt_quantized(tiny_transformer())
    assert is_modelopt_quantized(quantized(modelopt_config()))


def test_our_config_takes_every_block_linear_and_nothing_else(arch: FluxArchitecture) -> None:
    model = quantized(modelopt_config())
    linears = diffusers_linears(arch)
    assert enabled(model, "weight_quantizer") == {path for paths in linears.values() for path in paths}
    assert enabled(model, "input_quantizer") == {
        path for name, paths in linears.items() for path in paths if not name.endswith(("_mod.lin", "modulation.lin"))
    }
    assert modelopt_recipe(model, arch).linears == set(block_linears(arch))


def test_ranges_are_those_of_the_quantizers(arch: FluxArchitecture) -> None:
    model = quantized(modelopt_config())
    recipe = modelopt_recipe(model, arch, headroom=1.5)
    assert recipe.config == Fp8Config(Granularity.TENSOR, Activations.STATIC, (), 1.5)
    quantizer = model.single_transformer_blocks[1].proj_out.input_quantizer
    assert recipe.input_amax["single_blocks.1.linear2"] == float(quantizer.amax)
    assert recipe == plan_recipe(arch, recipe.config, recipe.input_amax)


def test_a_fused_layer_takes_the_largest_range_of_its_parts(arch: FluxArchitecture) -> None:
    model = quantized(modelopt_config())
    model.single_transformer_blocks[0].attn.to_v.input_quantizer.amax = torch.tensor(999.0)
    assert modelopt_recipe(model, arch).input_amax["single_blocks.0.linear1"] == 999.0


def test_the_default_config_loses_proj_out_and_it_is_said(
    arch: FluxArchitecture, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantized(mtq.FP8_DEFAULT_CFG)
    with caplog.at_level(logging.WARNING, "trt_core.fp8"):
        recipe = modelopt_recipe(model, arch)
    lost = ("single_blocks.0.linear2", "single_blocks.1.linear2")
    assert left_in_bf16(arch, recipe) == lost
    assert recipe.config.exclude == lost
    assert recipe.config.granularity is Granularity.TENSOR
    assert recipe.config.activations is Activations.STATIC
    assert "left 2 of 26 block layers in bf16: single_blocks.*.linear2 (2)" in caplog.text


def test_per_channel_and_per_token_become_rows_and_dynamic(arch: FluxArchitecture) -> None:
    recipe = modelopt_recipe(quantized(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG), arch)
    assert recipe.config.granularity is Granularity.ROW
    assert recipe.config.activations is Activations.DYNAMIC
    assert not recipe.input_amax


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("activations", Activations)
def test_our_configs_come_back_as_they_were(
    arch: FluxArchitecture, granularity: Granularity, activations: Activations
) -> None:
    config = Fp8Config(granularity, activations)
    recipe = modelopt_recipe(quantized(modelopt_config(config)), arch)
    assert recipe.config == config
    assert recipe.linears == plan_recipe(arch, Fp8Config()).linears


def test_dynamic_needs_no_forward_loop(arch: FluxArchitecture) -> None:
    config = modelopt_config(Fp8Config())
    assert modelopt_recipe(quantized(config, None), arch).config == Fp8Config()


def test_a_fused_layer_is_excluded_if_one_part_is(arch: FluxArchitecture) -> None:
    config = modelopt_config(Fp8Config(Granularity.TENSOR, Activations.STATIC, ("transformer_blocks.1.attn.to_k",)))
    recipe = modelopt_recipe(quantized(config), arch)
    assert left_in_bf16(arch, recipe) == ("double_blocks.1.img_attn.qkv",)


def test_exclude_patterns_mean_the_same_in_both_programs(arch: FluxArchitecture) -> None:
    for pattern in ("*.to_out.0", "single_transformer_blocks.*.proj_out", "*norm1.linear", "transformer_blocks.0.*"):
        config = Fp8Config(Granularity.TENSOR, Activations.STATIC, (pattern,))
        read = modelopt_recipe(quantized(modelopt_config(config)), arch)
        assert read.linears == plan_recipe(arch, Fp8Config(exclude=(pattern,))).linears


def test_weight_only_layers_stay_in_bf16(arch: FluxArchitecture) -> None:
    config = modelopt_config()
    config["quant_cfg"].append({"quantizer_name": "transformer_blocks.0.ff.net.2.input_quantizer", "enable": False})
    recipe = modelopt_recipe(quantized(config), arch)
    assert left_in_bf16(arch, recipe) == ("double_blocks.0.img_mlp.2",)


def test_disabling_afterwards_counts(arch: FluxArchitecture) -> None:
    model = quantized(modelopt_config())
    mtq.disable_quantizer(model, "*ff_context*")
    assert len(left_in_bf16(arch, modelopt_recipe(model, arch))) == 4


def test_weights_stay_the_base(arch: FluxArchitecture) -> None:
    model, plain = quantized(modelopt_config()), tiny_transformer()
    modelopt_recipe(model, arch)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in plain.named_parameters())


def test_uncalibrated_is_an_error(arch: FluxArchitecture) -> None:
    model = quantized(modelopt_config(), None)
    with pytest.raises(InvalidOption, match=r"double_blocks.0.img_attn.qkv.*never calibrated.*forward_loop"):
        modelopt_recipe(model, arch)


@pytest.mark.parametrize(
    ("preset", "text"), [("INT8_DEFAULT_CFG", "num_bits=8"), ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "block of channels")]
)
def test_other_formats_are_refused(arch: FluxArchitecture, preset: str, text: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"{text}.*FP8 E4M3.*modelopt_config"):
        modelopt_recipe(quantized(getattr(mtq, preset)), arch)


def test_smoothed_weights_are_refused(arch: FluxArchitecture) -> None:
    model = quantized(modelopt_config())
    # ModelOpt 0.47 smooths INT8 only; a model restored from elsewhere may still carry the factor.
    model.transformer_blocks[0].attn.to_q.input_quantizer.pre_quant_scale = torch.full((model.inner_dim,), 0.5)
    with pytest.raises(UnsupportedModel, match="smoothing factor"):
        modelopt_recipe(model, arch)


def test_a_mixture_of_static_and_dynamic_is_refused(arch: FluxArchitecture) -> None:
    config = modelopt_config()
    config["quant_cfg"].append(
        {
            "quantizer_name": "single_transformer_blocks.1.proj_out.input_quantizer",
            "cfg": {"num_bits": (4, 3), "type": "dynamic"},
        }
    )
    with pytest.raises(UnsupportedModel, match=r"single_blocks.1.linear2 a dynamic one"):
        modelopt_recipe(quantized(config), arch)


def test_everything_disabled_is_an_error(arch: FluxArchitecture) -> None:
    model = quantized(modelopt_config())
    mtq.disable_quantizer(model, "*")
    with pytest.raises(InvalidOption, match="leave no layer"):
        modelopt_recipe(model, arch)
