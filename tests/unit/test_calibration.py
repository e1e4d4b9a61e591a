"""Ranges from calibration on tiny real models: against a count by hand and against ModelOpt, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from demo.checkpoint import write_tiny_pipeline
from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core.calibration import PromptCalibration, collect_input_ranges, feed_of, record_calls
from trt_core.errors import BuildCancelled, InvalidOption
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import Activations, Fp8Config, block_linears, diffusers_linears, is_modulation
from trt_core.host import Silent
from trt_core.quantize import quantize_fp8_

STATIC = Fp8Config(activations=Activations.STATIC)


class Seen:
    """A host that writes progress down and cancels after some steps."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.cancel_after = cancel_after

    def update(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done, total))

    def cancelled(self) -> bool:
        return self.cancel_after is not None and len(self.steps) >= self.cancel_after


def architecture(model: FluxTransformer2DModel) -> FluxArchitecture:
    return FluxArchitecture.from_diffusers_config(dict(model.config))


def samples(model: FluxTransformer2DModel, number: int = 3) -> list[dict[str, Any]]:
    return [call_inputs(model, seed=seed, height=3 + seed, width=4) for seed in range(number)]


def calibrate(model: FluxTransformer2DModel, calibration: Any, pipe: Any = None, **options: Any) -> Mapping[str, float]:
    progress = options.pop("progress", Silent())
    return collect_input_ranges(model, architecture(model), feed_of(calibration, pipe), progress, **options).amax


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def amax_by_hand(model: FluxTransformer2DModel, calls: list[dict[str, Any]]) -> dict[str, float]:
    """The same from patched forwards of the linears instead of hooks."""
    seen: dict[str, list[float]] = {}
    for name, paths in diffusers_linears(architecture(model)).items():
        for path in paths:
            layer, rows = model.get_submodule(path), seen.setdefault(name, [])

            def forward(x: Tensor, layer: nn.Module = layer, rows: list[float] = rows) -> Tensor:
                rows.append(max(abs(value) for value in x.flatten().tolist()))
                return nn.functional.linear(x, layer.weight, layer.bias)

            layer.forward = forward
    for inputs in calls:
        run_diffusers(model, inputs)
    return {name: max(rows) for name, rows in seen.items() if not is_modulation(name)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> FluxPipeline:
    files = write_tiny_pipeline(tmp_path_factory.mktemp("flux") / "pipeline")
    pipe = FluxPipeline.from_pretrained(files, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_the_largest_input_of_each_linear_exactly() -> None:
    model = tiny_transformer(adversarial=True)
    found = calibrate(model, samples(model))
    assert found == amax_by_hand(tiny_transformer(adversarial=True), samples(model))
    assert set(found) == {name for name in block_linears(architecture(model)) if not is_modulation(name)}


def test_bf16_inputs_are_exact_too() -> None:
    model = tiny_transformer().bfloat16()
    assert calibrate(model, samples(model)) == amax_by_hand(tiny_transformer().bfloat16(), samples(model))


def test_more_samples_never_lower_a_range() -> None:
    model = tiny_transformer()
    few, many = calibrate(model, samples(model, 2)), calibrate(model, samples(model, 5))
    assert all(many[name] >= few[name] for name in few)
    assert many != few


def test_equal_to_modelopt_max_calibration() -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from trt_core.modelopt_input import modelopt_config

    ours, theirs = tiny_transformer(adversarial=True), tiny_transformer(adversarial=True)
    calls = samples(ours)
    mtq.quantize(theirs, modelopt_config(), lambda model: [run_diffusers(model, inputs) for inputs in calls])
    expected = {
        name: {float(theirs.get_submodule(path).input_quantizer.amax) for path in paths}
        for name, paths in diffusers_linears(architecture(theirs)).items()
        if not is_modulation(name)
    }
    assert {name: {amax} for name, amax in calibrate(ours, calls).items()} == expected


def test_a_lora_counts() -> None:
    model = tiny_transformer()
    plain = calibrate(model, samples(model))
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=["proj_out", "to_q"], init_lora_weights=False))
    with_lora = calibrate(model, samples(model))
    assert set(with_lora) == set(plain)
    assert with_lora["double_blocks.0.img_attn.qkv"] == plain["double_blocks.0.img_attn.qkv"]
    assert with_lora["single_blocks.1.linear1"] != plain["single_blocks.1.linear1"]


@pytest.mark.parametrize("as_generator", [False, True])
def test_a_function_and_a_generator_of_calls(as_generator: bool) -> None:
    model = tiny_transformer()
    calls = samples(model)
    expected = calibrate(model, calls)
    given = (call for call in calls) if as_generator else lambda m: [run_diffusers(m, call) for call in calls]
    assert calibrate(model, given) == expected


def test_recorded_calls_give_what_the_run_gave(pipeline: FluxPipeline) -> None:
    wanted = PromptCalibration(("a cat", "a dog"), steps=2, height_px=64, width_px=96, txt_tokens=16)
    with record_calls(pipeline.transformer) as calls:
        direct = calibrate(pipeline.transformer, wanted, pipeline)
    assert len(calls) == 4
    assert calibrate(pipeline.transformer, calls) == direct
    assert hooks_of(pipeline.transformer) == 0


def test_prompts_and_seeds_matter_and_repeat(pipeline: FluxPipeline) -> None:
    def of(*prompts: str, seed: int = 0) -> Mapping[str, float]:
        wanted = PromptCalibration(prompts, steps=2, height_px=64, width_px=64, txt_tokens=16, seed=seed)
        return calibrate(pipeline.transformer, wanted, pipeline)

    first = of("a cat")
    assert of("a cat") == first
    assert of("a red house") != first
    assert of("a cat", seed=5) != first


def test_progress_counts_the_calls_and_ends(pipeline: FluxPipeline) -> None:
    seen = Seen()
    wanted = PromptCalibration(("a cat", "a dog"), steps=3, height_px=64, width_px=64, txt_tokens=16)
    calibrate(pipeline.transformer, wanted, pipeline, progress=seen)
    assert seen.steps == [("Calibrating FP8", done, 6) for done in range(7)]


def test_progress_without_a_known_total_ends_too() -> None:
    model, seen = tiny_transformer(), Seen()
    calibrate(model, iter(samples(model)), progress=seen)
    assert [done for _, done, _ in seen.steps] == [0, 1, 2, 3]
    assert all(done < total for _, done, total in seen.steps[:-1])
    assert seen.steps[-1][1:] == (3, 3)


def test_cancel_stops_at_the_next_call_and_leaves_no_hook() -> None:
    model, seen = tiny_transformer(), Seen(cancel_after=2)
    with pytest.raises(BuildCancelled):
        calibrate(model, samples(model, 5), progress=seen)
    assert len(seen.steps) == 2
    assert hooks_of(model) == 0


def test_hooks_of_others_stay() -> None:
    model = tiny_transformer()
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: None)
    calibrate(model, samples(model))
    assert hooks_of(model) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("config", "words"), [(STATIC, "largest input of (nan|inf)"), (Fp8Config(), "mean input of (nan|-?inf)")]
)
def test_inputs_that_are_no_numbers_name_a_layer(value: float, config: Fp8Config, words: str) -> None:
    model, calls = tiny_transformer(), samples(tiny_transformer())
    calls[1]["hidden_states"][0, 0, 0] = value
    with pytest.raises(InvalidOption, match=rf"{words} in double_blocks\.0\.img_attn\.qkv"):
        quantize_fp8_(model, config, calibration=calls, progress=Silent())
    assert hooks_of(model) == 0


def test_a_layer_that_saw_only_zeros_is_named_where_it_needs_a_scale() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[0].proj.weight.zero_()
        model.transformer_blocks[1].ff.net[0].proj.bias.zero_()
    with pytest.raises(InvalidOption, match=r"largest input of 0.0 in double_blocks.1.img_mlp.2"):
        quantize_fp8_(model, STATIC, calibration=samples(model), progress=Silent())
    means = quantize_fp8_(model, calibration=samples(model), progress=Silent()).input_mean
    assert not means["double_blocks.1.img_mlp.2"].any()
    assert means["double_blocks.1.img_mlp.0"].any()


def test_one_call_is_too_few_unless_asked_for() -> None:
    model = tiny_transformer()
    with pytest.raises(InvalidOption, match=r"single call.*16 to 128.*allow_few=True"):
        calibrate(model, samples(model, 1))
    assert calibrate(model, samples(model, 1), allow_few=True) == calibrate(model, samples(model, 1) * 2)


@pytest.mark.parametrize("nothing", [[], (), iter(()), PromptCalibration(()), lambda model: None])
def test_no_call_at_all_is_an_error(nothing: Any) -> None:
    with pytest.raises(InvalidOption, match="not once"):
        calibrate(tiny_transformer(), nothing, allow_few=True)


def test_fused_projections_are_not_seen_and_said() -> None:
    model = tiny_transformer()
    for block in model.transformer_blocks:
        block.attn.fuse_projections()
    with pytest.raises(InvalidOption, match=r"4 layers saw no input.*double_blocks.0.img_attn.qkv.*unfuse"):
        calibrate(model, samples(model))


def test_prompts_need_a_pipeline() -> None:
    model = tiny_transformer()
    with pytest.raises(InvalidOption, match="needs the whole pipeline"):
        calibrate(model, ["a cat"], model)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (7, "Calibration got int"),
        ({"hidden_states": None}, "into a list"),
        ([7, 8], "int as sample 0"),
        ([{"image": 1}], "sample 0 does not fit the transformer"),
        (["a cat", 7], "not all texts"),
    ],
)
def test_data_of_another_kind_is_refused(given: Any, text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        calibrate(tiny_transformer(), given)


def test_a_call_that_misses_an_argument_is_named() -> None:
    model = tiny_transformer()
    calls = samples(model)
    del calls[2]["hidden_states"]
    with pytest.raises(InvalidOption, match="sample 2 does not fit the transformer: missing a required argument"):
        calibrate(model, calls)
    assert hooks_of(model) == 0


def test_recorded_tensors_are_copies(tmp_path: Path) -> None:
    model = tiny_transformer()
    inputs = call_inputs(model)
    with record_calls(model) as calls:
        run_diffusers(model, inputs)
    before = calls[0]["hidden_states"].clone()
    inputs["hidden_states"].zero_()
    assert torch.equal(calls[0]["hidden_states"], before)
    assert calls[0]["return_dict"] is False
