"""Every argument of diffusers' forward, and sizes that change from call to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from tests.unit.diffusers_pair import LORA_BOUND, Pair, lora
from tests.unit.tiny_flux import FP32_BOUND, call_inputs, exact_inputs, run_diffusers, tiny_transformer
from trt_core.backends.check import relative_l2
from trt_core.compiled_flux import _spread
from trt_core.errors import UnsupportedModel


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def residuals(count: int, batch: int = 1, seed: int = 4) -> list[Tensor] | None:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 40, 64, generator=random) for _ in range(count)] or None


SIZES = [
    {},
    {"batch": 2},
    {"height": 9, "width": 3},
    {"text": 1},
    {"batch": 3, "height": 2, "width": 7, "text": 12},
    {},
]


def test_sizes_may_change_at_every_call(pair: Pair) -> None:
    for sizes in SIZES:
        assert pair.error(sizes) <= FP32_BOUND, sizes
    assert pair.report.builds == 1


@pytest.mark.parametrize(
    "variant", [{"guidance": False}, {"in_channels": 384, "out_channels": 64}], ids=["schnell", "fill"]
)
def test_other_variants(variant: dict[str, Any], tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_transformer(**variant))
    for sizes in SIZES[:3]:
        assert pair.error(sizes) <= FP32_BOUND


def test_bf16_is_as_close_as_eager(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_transformer(adversarial=True).bfloat16())
    pair.add("a", lora())
    seen, eager = pair.outputs()
    inputs = call_inputs(pair.theirs)
    reference = run_diffusers(pair.theirs.float(), exact_inputs(inputs))
    assert seen.dtype is eager.dtype is torch.bfloat16
    assert relative_l2(seen, reference) <= 1.5 * relative_l2(eager, reference)


@pytest.mark.parametrize("doubles", [0, 1, 2, 3])
@pytest.mark.parametrize("singles", [0, 1, 3])
@pytest.mark.parametrize("repeat", [False, True])
def test_controlnet_residuals(doubles: int, singles: int, repeat: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_transformer(double=3, single=3))
    plain, _ = pair.outputs()
    seen, expected = pair.outputs(
        controlnet_block_samples=residuals(doubles),
        controlnet_single_block_samples=residuals(singles, seed=5),
        controlnet_blocks_repeat=repeat,
    )
    assert relative_l2(seen, expected) <= FP32_BOUND
    assert (relative_l2(expected, plain) > 0.01) is bool(doubles + singles)
    assert torch.equal(pair.outputs()[0], plain), "residuals were for one call only"


def test_residuals_of_one_image_reach_a_whole_batch(pair: Pair) -> None:
    arguments = {"controlnet_block_samples": residuals(2), "controlnet_single_block_samples": residuals(1)}
    assert pair.error({"batch": 2}, **arguments) <= FP32_BOUND


def test_residuals_are_spread_as_over_fluxs_19_and_38_blocks() -> None:
    samples = [torch.full((1,), float(i)) for i in range(5)]
    assert [int(s) for s in _spread(samples, 19, False)] == [i // 4 for i in range(19)]
    assert [int(s) for s in _spread(samples, 19, True)] == [i % 5 for i in range(19)]
    assert [int(s) for s in _spread(samples[:2], 38, False)] == [i // 19 for i in range(38)]


def test_both_kinds_of_return(pair: Pair) -> None:
    inputs = call_inputs(pair.ours)
    with torch.no_grad():
        as_dict, as_tuple = pair.ours(**inputs), pair.ours(**inputs, return_dict=False)
    assert type(as_dict) is Transformer2DModelOutput
    assert type(as_tuple) is tuple
    assert torch.equal(as_dict.sample, as_tuple[0])
    assert len(as_tuple) == 1


def test_positional_arguments_are_diffusers(pair: Pair) -> None:
    names = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance",
    )  # fmt: skip
    values = call_inputs(pair.ours)
    with torch.no_grad():
        seen = pair.ours(*(values[name] for name in names), None, None, None, False)[0]
    assert relative_l2(seen, run_diffusers(pair.theirs, values)) <= FP32_BOUND


def test_ids_with_a_batch_dimension(pair: Pair) -> None:
    inputs = call_inputs(pair.ours, batch=2)
    older = {**inputs, "img_ids": inputs["img_ids"][None], "txt_ids": inputs["txt_ids"][None]}
    assert relative_l2(run_diffusers(pair.ours, older), run_diffusers(pair.theirs, inputs)) <= FP32_BOUND


def test_inputs_are_left_alone(pair: Pair) -> None:
    inputs, kwargs = call_inputs(pair.ours), {"scale": 0.5}
    before = {name: value.clone() for name, value in inputs.items()}
    samples = residuals(1)
    kept = samples[0].clone()
    run_diffusers(
        pair.ours, inputs, joint_attention_kwargs=kwargs,
        controlnet_block_samples=samples, controlnet_single_block_samples=samples,
    )  # fmt: skip
    assert all(torch.equal(value, inputs[name]) for name, value in before.items())
    assert kwargs == {"scale": 0.5}
    assert torch.equal(samples[0], kept)


def test_missing_guidance_says_what_to_pass(pair: Pair) -> None:
    inputs = call_inputs(pair.ours)
    del inputs["guidance"]
    with pytest.raises(UnsupportedModel, match=r"guidance-distilled.*Pass guidance_scale"):
        run_diffusers(pair.ours, inputs)
    assert pair.error() <= FP32_BOUND


def test_unknown_attention_arguments_run_the_whole_model_eagerly(pair: Pair) -> None:
    pair.add("a", lora())
    pair.outputs()
    seen, expected = pair.outputs(joint_attention_kwargs={"something": 1, "scale": 0.5})
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert pair.report.eager_blocks == {"the whole model": "joint_attention_kwargs has something"}
    assert pair.error() <= LORA_BOUND
    assert pair.report.eager_blocks == {}


def test_a_second_model_of_another_size_in_one_process(tmp_path: Path) -> None:
    first = Pair(tmp_path)
    second = Pair(tmp_path, tiny_transformer(heads=3, head_dim=16, double=1, single=3, seed=6))
    for pair in (first, second, first):
        assert pair.error() <= FP32_BOUND
