"""diffusers transformers in FP8 equal a simulation of the same recipe, and stay diffusers' own in everything else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tests.unit.fp8_simulation import Scheme, compiled_fp8, fused_layers, largest_inputs, simulation, three_ways
from tests.unit.tiny_flux import FP32_BOUND, call_inputs, exact_inputs, run_diffusers, tiny_transformer
from trt_core.backends.check import relative_l2

RATIO_BOUND = 1.2
COSINE_BOUND = 0.995
EQUAL = 2e-4
"""In fp32 only the last bit of a sum differs from the simulation, which rounds a few activations to their neighbour."""
FP8_EFFECT = 0.004
WIDE = {"heads": 4, "head_dim": 64}
"""As wide as it takes for bf16's own rounding to lie far below FP8's, as in the real model."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def calls(model: FluxTransformer2DModel) -> list[dict[str, Any]]:
    return [exact_inputs(call_inputs(model, seed=seed)) for seed in (1, 2, 3)]


def static(model: FluxTransformer2DModel, **options: Any) -> Scheme:
    return Scheme(input_amax=largest_inputs(copy.deepcopy(model).float(), calls(model)), **options)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_transformer()


# -- the same numbers as the simulation ------------------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_the_simulations(
    dtype: torch.dtype, per_row: bool, is_static: bool, adversarial: bool, tmp_path: Path
) -> None:
    plain = tiny_transformer(**WIDE, adversarial=adversarial).to(dtype)
    scheme = static(plain, per_row=per_row) if is_static else Scheme(per_row)
    found = three_ways(
        compiled_fp8(copy.deepcopy(plain), scheme, tmp_path), plain, scheme, call_inputs(plain, height=8)
    )
    simulated = relative_l2(found.simulated, found.exact)
    assert simulated > FP8_EFFECT
    assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * simulated
    assert cosine(found.ours, found.exact) >= COSINE_BOUND
    if dtype is torch.float32:
        assert relative_l2(found.ours, found.simulated) <= EQUAL


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_inductor_computes_the_same(is_static: bool, tmp_path: Path) -> None:
    plain = tiny_transformer(double=1, single=1, adversarial=True)
    scheme = static(plain) if is_static else Scheme()
    ours = compiled_fp8(copy.deepcopy(plain), scheme, tmp_path, backend="inductor")
    for sizes in ({}, {"height": 9, "width": 4, "text": 5}):
        found = three_ways(ours, plain, scheme, call_inputs(plain, **sizes))
        assert relative_l2(found.ours, found.simulated) <= 20 * EQUAL
        assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * relative_l2(found.simulated, found.exact)
    words = ours.trt_report().segments
    assert words["double_block"].startswith("inductor")
    assert f"fp8 per row, {'static' if is_static else 'dynamic'}" in words["single_block"]
    assert ours.trt_report().builds == 1


@pytest.mark.parametrize(
    "wrong",
    [
        Scheme(per_row=False),
        Scheme(quantized_modulations=False),
        Scheme(excluded=frozenset({"single_blocks.1.linear2"})),
    ],
    ids=["other granularity", "modulations as they are", "one layer as it is"],
)
def test_a_simulation_of_another_scheme_is_told_apart(wrong: Scheme, model: Any, tmp_path: Path) -> None:
    """Each of these would also pass the bound on the error's ratio; the comparison in fp32 would not let it."""
    ours = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path)
    found = three_ways(ours, model, wrong, call_inputs(model))
    assert relative_l2(found.ours, found.simulated) > 20 * EQUAL


def test_a_range_too_small_is_clamped_as_the_simulation_says(model: Any, tmp_path: Path) -> None:
    small = {name: amax / 4 for name, amax in static(model).input_amax.items()}
    scheme = Scheme(input_amax=small, headroom=1.0)
    found = three_ways(compiled_fp8(copy.deepcopy(model), scheme, tmp_path), model, scheme, call_inputs(model))
    assert relative_l2(found.ours, found.simulated) <= EQUAL
    assert relative_l2(found.ours, found.exact) > 0.1, "a quarter of the range cuts much off"


def test_modulations_multiply_inputs_that_are_not_rounded(tmp_path: Path, model: Any) -> None:
    """With all other layers excluded, only weights are rounded, and only those of modulations."""
    scheme = Scheme(
        patterns=("*_attn.*", "*_mlp.*", "*.linear1", "*.linear2"),
        excluded=frozenset(n for n in fused_layers(model) if not n.endswith(("_mod.lin", "modulation.lin"))),
    )
    found = three_ways(compiled_fp8(copy.deepcopy(model), scheme, tmp_path), model, scheme, call_inputs(model))
    assert relative_l2(found.ours, found.simulated) <= FP32_BOUND
    assert relative_l2(found.ours, found.exact) > FP8_EFFECT


# -- layers that stay as they are --------------------------------------------------------------------------------------

EXCLUDED = {
    "one layer of all blocks": (("single_blocks.*.linear2",), {"single_blocks.0.linear2", "single_blocks.1.linear2"}),
    "a block": (("double_blocks.1.*",), None),
    "diffusers' name": (("*.to_add_out",), {"double_blocks.0.txt_attn.proj", "double_blocks.1.txt_attn.proj"}),
    "different in each block": (
        ("double_blocks.0.img_mlp.?", "single_blocks.1.linear1"),
        {"double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.2", "single_blocks.1.linear1"},
    ),
    "modulations": (("*_mod.lin", "*.modulation.lin"), None),
}


def excluded_names(model: FluxTransformer2DModel, case: str) -> frozenset[str]:
    names = EXCLUDED[case][1]
    if names is None:
        marks = ("double_blocks.1.",) if case == "a block" else ("_mod.lin", "modulation.lin")
        names = {n for n in fused_layers(model) if n.startswith(marks) or n.endswith(marks)}
    return frozenset(names)


@pytest.mark.parametrize("case", EXCLUDED)
def test_excluded_layers_stay_in_the_models_dtype(case: str, model: Any, tmp_path: Path) -> None:
    scheme = Scheme(patterns=EXCLUDED[case][0], excluded=excluded_names(model, case))
    ours = compiled_fp8(copy.deepcopy(model), scheme, tmp_path)
    found = three_ways(ours, model, scheme, call_inputs(model))
    assert relative_l2(found.ours, found.simulated) <= EQUAL
    bound = ours._trt_state.module.weights.tensors
    plain = {n for n in fused_layers(model) if bound[f"{n}.weight"].dtype is torch.float32}
    assert plain == scheme.excluded
    assert all((f"{n}.weight_scale" in bound) is (n not in plain) for n in fused_layers(model))


def test_blocks_of_several_precisions_are_compiled_side_by_side(model: Any, tmp_path: Path) -> None:
    scheme = Scheme(patterns=EXCLUDED["a block"][0], excluded=excluded_names(model, "a block"))
    ours = compiled_fp8(copy.deepcopy(model), scheme, tmp_path, backend="inductor")
    for sizes in ({}, {"height": 3}):
        found = three_ways(ours, model, scheme, call_inputs(model, **sizes))
        assert relative_l2(found.ours, found.simulated) <= 20 * EQUAL
    assert ours.trt_report().builds == 2, "double blocks with and without FP8"


# -- every kind of call ------------------------------------------------------------------------------------------------

SIZES = [{}, {"batch": 2}, {"height": 9, "width": 3}, {"text": 1}, {"batch": 3, "height": 2, "width": 7, "text": 12}]


def test_sizes_may_change_at_every_call(model: Any, tmp_path: Path) -> None:
    ours = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path)
    for sizes in SIZES:
        found = three_ways(ours, model, Scheme(), call_inputs(model, **sizes))
        assert relative_l2(found.ours, found.simulated) <= EQUAL, sizes
    assert ours.trt_report().builds == 1


def _beside(ours: Any, model: Any, inputs: Mapping[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    return run_diffusers(ours, inputs, **more), run_diffusers(simulation(model, Scheme()), inputs, **more)


def test_tokens_of_a_reference_picture(model: Any, tmp_path: Path) -> None:
    """Kontext: a second picture's tokens after the first's, told apart by the first axis of their ids."""
    inputs, reference = call_inputs(model), call_inputs(model, height=4, width=6, seed=5)
    ids = reference["img_ids"].clone()
    ids[:, 0] = 1
    inputs["hidden_states"] = torch.cat((inputs["hidden_states"], reference["hidden_states"]), dim=1)
    inputs["img_ids"] = torch.cat((inputs["img_ids"], ids))
    seen, expected = _beside(compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), model, inputs)
    assert seen.shape[1] == 64
    assert relative_l2(seen, expected) <= EQUAL


def test_controlnet_residuals(model: Any, tmp_path: Path) -> None:
    ours, random = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), torch.Generator().manual_seed(4)
    inputs = call_inputs(model)
    samples = [torch.randn(1, 40, 64, generator=random) for _ in range(3)]
    more = {"controlnet_block_samples": samples[:2], "controlnet_single_block_samples": samples[2:]}
    plain = run_diffusers(ours, inputs)
    seen, expected = _beside(ours, model, inputs, **more)
    assert relative_l2(seen, expected) <= EQUAL
    assert relative_l2(seen, plain) > 0.01
    assert torch.equal(run_diffusers(ours, inputs), plain)


@pytest.mark.parametrize("variant", [{"guidance": False}, {"in_channels": 384, "out_channels": 64}],
                         ids=["schnell", "fill"])  # fmt: skip
def test_other_variants(variant: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_transformer(**variant)
    found = three_ways(compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), model, Scheme(), call_inputs(model))
    assert relative_l2(found.ours, found.simulated) <= EQUAL
