"""The public entry on tiny diffusers models and pipelines: what is attached, what is refused, what is undone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from demo.checkpoint import write_tiny_pipeline
from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core import compile_transformer
from trt_core.calibration import PromptCalibration
from trt_core.errors import InvalidOption, MissingDependency, UnsupportedModel
from trt_core.fp8_recipe import (
    Activations,
    Fp8Config,
    Granularity,
    attached_recipe,
    block_linears,
    plan_recipe,
    same_recipe,
)
from trt_core.host import Silent
from trt_core.quantize import calibrate_with_modelopt, dequantize_, flux_architecture, quantize_fp8_
from trt_core.recipe_file import load_recipe, save_recipe

STATIC = Fp8Config(activations=Activations.STATIC)
ROOT = Path(__file__).parents[2]


def samples(model: FluxTransformer2DModel) -> list[dict[str, Any]]:
    return [call_inputs(model, seed=seed) for seed in range(2)]


def static_(model: FluxTransformer2DModel, **options: Any) -> Any:
    return quantize_fp8_(model, STATIC, calibration=samples(model), progress=Silent(), **options)


@pytest.fixture
def pipe(tmp_path: Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(write_tiny_pipeline(tmp_path / "pipeline"), torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_transformer()


def test_the_default_is_every_block_linear_by_row_and_dynamic(model: FluxTransformer2DModel) -> None:
    recipe = quantize_fp8_(model)
    assert recipe.config == Fp8Config(Granularity.ROW, Activations.DYNAMIC, (), 2.0)
    assert recipe.linears == set(block_linears(flux_architecture(model)))
    assert attached_recipe(model) is recipe


def test_weights_outputs_and_state_dict_stay(model: FluxTransformer2DModel) -> None:
    inputs, plain = call_inputs(model), tiny_transformer()
    static_(model)
    assert torch.equal(run_diffusers(model, inputs), run_diffusers(plain, inputs))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert dict(model.config) == dict(plain.config)


def test_a_copied_model_keeps_its_recipe(model: FluxTransformer2DModel) -> None:
    recipe = static_(model)
    assert attached_recipe(copy.deepcopy(model)) == recipe


def test_static_from_prompts_through_a_pipeline(pipe: FluxPipeline, tmp_path: Path) -> None:
    prompts = PromptCalibration(("a cat", "a dog"), steps=2, height_px=64, width_px=64, txt_tokens=16)
    recipe = quantize_fp8_(pipe, STATIC, calibration=prompts, progress=Silent())
    assert attached_recipe(pipe.transformer) is recipe
    assert set(recipe.input_amax) == recipe.activation_linears
    arch = flux_architecture(pipe)
    loaded = load_recipe(save_recipe(tmp_path / "scales.safetensors", recipe, arch), arch)
    dequantize_(pipe)
    assert same_recipe(quantize_fp8_(pipe, recipe=loaded), recipe)


def test_calibration_leaves_no_trace(model: FluxTransformer2DModel) -> None:
    static_(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.training is False


def test_a_failed_calibration_attaches_nothing(model: FluxTransformer2DModel) -> None:
    with pytest.raises(InvalidOption, match="single call"):
        quantize_fp8_(model, STATIC, calibration=samples(model)[:1], progress=Silent())
    assert attached_recipe(model) is None
    quantize_fp8_(model, STATIC, calibration=samples(model)[:1], progress=Silent(), allow_few=True)
    assert attached_recipe(model) is not None


def test_dequantize_takes_it_off_again(model: FluxTransformer2DModel) -> None:
    recipe = quantize_fp8_(model)
    assert dequantize_(model) is recipe
    assert attached_recipe(model) is None
    assert dequantize_(model) is None


def test_dynamic_takes_calibration_and_needs_none(model: FluxTransformer2DModel) -> None:
    """For its mean inputs (`test_calibrated_means`); it has no ranges either way."""
    assert not quantize_fp8_(model).input_mean
    dequantize_(model)
    recipe = quantize_fp8_(model, calibration=samples(model), progress=Silent())
    assert attached_recipe(model) is recipe
    assert recipe.input_mean
    assert not recipe.input_amax


def test_static_needs_calibration(model: FluxTransformer2DModel) -> None:
    with pytest.raises(InvalidOption, match="none was given"):
        quantize_fp8_(model, STATIC)


@pytest.mark.parametrize("activations", Activations)
def test_a_mistyped_pattern_is_said_before_calibration(model: FluxTransformer2DModel, activations: Activations) -> None:
    calls: list[int] = []
    with pytest.raises(InvalidOption, match="matches no layer"):
        quantize_fp8_(
            model,
            Fp8Config(activations=activations, exclude=("nothing",)),
            calibration=lambda m: calls.append(1),
        )
    assert not calls


def test_a_recipe_comes_alone(model: FluxTransformer2DModel) -> None:
    recipe = plan_recipe(flux_architecture(model), Fp8Config())
    with pytest.raises(InvalidOption, match="Both recipe and config"):
        quantize_fp8_(model, Fp8Config(), recipe=recipe)
    with pytest.raises(InvalidOption, match="Both recipe and calibration"):
        quantize_fp8_(model, calibration=samples(model), recipe=recipe)


def test_a_recipe_of_another_model_is_refused(model: FluxTransformer2DModel) -> None:
    foreign = plan_recipe(flux_architecture(tiny_transformer(single=4)), Fp8Config())
    with pytest.raises(InvalidOption, match="another model"):
        quantize_fp8_(model, recipe=foreign)


def test_twice_is_refused_with_the_way_out(model: FluxTransformer2DModel) -> None:
    quantize_fp8_(model)
    with pytest.raises(InvalidOption, match="dequantize_"):
        quantize_fp8_(model)


def test_weights_that_were_rounded_already_are_refused(model: FluxTransformer2DModel) -> None:
    layer = model.single_transformer_blocks[0].proj_out
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        UnsupportedModel, match=r"single_transformer_blocks.0.proj_out.weight is Tensor of float8_e4m3fn"
    ):
        quantize_fp8_(model)


@pytest.mark.parametrize("other", [nn.Linear(3, 3), object(), None])
def test_other_models_are_refused(other: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"is not a FLUX\.1 transformer"):
        quantize_fp8_(other)


def test_a_compiled_transformer_is_calibrated_as_a_plain_one(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    compile_transformer(model, backend="eager", cache_folder=str(tmp_path), progress=Silent())
    run_diffusers(model, call_inputs(model))
    recipe = static_(model)
    assert type(model) is FluxTransformer2DModel
    assert recipe == static_(tiny_transformer())


def test_importing_needs_no_modelopt() -> None:
    code = (
        "import sys, json; sys.modules['modelopt'] = None\n"
        "import trt_core.quantize, trt_core.modelopt_input\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('modelopt.')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_without_modelopt_the_package_is_named(model: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(MissingDependency, match=r"nvidia-modelopt 0.47 or newer.*pip install .?nvidia-modelopt>=0.47"):
        calibrate_with_modelopt(model, samples(model))


class TestWithModelOpt:
    """ModelOpt's own calibration and ModelOpt's own models."""

    @pytest.fixture(autouse=True)
    def _modelopt(self) -> None:
        self.mtq = pytest.importorskip("modelopt.torch.quantization")

    def quantized(self, config: dict[str, Any]) -> FluxTransformer2DModel:
        model = tiny_transformer()
        return self.mtq.quantize(model, config, lambda m: [run_diffusers(m, inputs) for inputs in samples(model)])

    @pytest.mark.parametrize("exclude", [(), ("single_blocks.*.linear2", "transformer_blocks.0.attn.to_k")])
    def test_its_calibration_gives_our_recipe(self, model: FluxTransformer2DModel, exclude: tuple[str, ...]) -> None:
        config = Fp8Config(Granularity.TENSOR, Activations.STATIC, exclude, 1.5)
        ours = quantize_fp8_(model, config, calibration=samples(model), progress=Silent())
        dequantize_(model)
        theirs = calibrate_with_modelopt(model, samples(model), config, progress=Silent())
        assert theirs == ours
        assert ours.input_mean, "ModelOpt collects none"
        assert not theirs.input_mean
        assert quantize_fp8_(model, recipe=theirs) == ours

    def test_its_calibration_leaves_the_model_plain(self, model: FluxTransformer2DModel) -> None:
        kinds = [type(module) for module in model.modules()]
        calibrate_with_modelopt(model, samples(model), progress=Silent())
        assert [type(module) for module in model.modules()] == kinds
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_its_calibration_copies_no_weight(self, model: FluxTransformer2DModel) -> None:
        seen: set[int] = set()

        def loop(given: FluxTransformer2DModel) -> None:
            seen.update(parameter.data_ptr() for parameter in given.parameters())
            for inputs in samples(model):
                run_diffusers(given, inputs)

        calibrate_with_modelopt(model, loop, progress=Silent())
        assert seen == {parameter.data_ptr() for parameter in model.parameters()}

    def test_prompts_run_through_the_copy(self, pipe: FluxPipeline) -> None:
        own = pipe.transformer
        prompts = PromptCalibration(("a cat",), steps=2, height_px=64, width_px=64, txt_tokens=16)
        theirs = calibrate_with_modelopt(pipe, prompts, progress=Silent())
        assert pipe.transformer is own
        assert theirs == quantize_fp8_(pipe, STATIC, calibration=prompts, progress=Silent())

    def test_one_call_is_too_few_here_too(self, model: FluxTransformer2DModel) -> None:
        with pytest.raises(InvalidOption, match="single call"):
            calibrate_with_modelopt(model, samples(model)[:1], progress=Silent())

    def test_nan_is_an_option_error(self, model: FluxTransformer2DModel) -> None:
        calls = samples(model)
        calls[0]["hidden_states"].fill_(float("nan"))
        with pytest.raises(InvalidOption, match=r"ModelOpt stopped calibrating.*nan"):
            calibrate_with_modelopt(model, calls, progress=Silent())

    def test_dynamic_is_refused(self, model: FluxTransformer2DModel) -> None:
        with pytest.raises(InvalidOption, match="ModelOpt calibrates ranges, and dynamic scales need none"):
            calibrate_with_modelopt(model, samples(model), Fp8Config())

    def test_a_model_it_quantized_brings_its_recipe(self) -> None:
        model = self.quantized(self.mtq.FP8_DEFAULT_CFG)
        recipe = quantize_fp8_(model)
        assert attached_recipe(model) is recipe
        assert recipe.config.activations is Activations.STATIC
        assert "single_blocks.0.linear2" not in recipe.linears

    def test_config_may_add_to_it_and_not_contradict_it(self) -> None:
        model = self.quantized(self.mtq.FP8_DEFAULT_CFG)
        with pytest.raises(InvalidOption, match="per tensor with static activations, which is not what config asks"):
            quantize_fp8_(model, Fp8Config())
        with pytest.raises(InvalidOption, match="calibrated this transformer already"):
            quantize_fp8_(model, calibration=samples(model))
        more = Fp8Config(Granularity.TENSOR, Activations.STATIC, ("*.linear1",), 3.0)
        recipe = quantize_fp8_(model, more)
        assert recipe.config.headroom == 3.0
        assert not any(name.endswith(("linear1", "linear2")) for name in recipe.linears)
