"""FP8 models whose bases are on the GPU: modulations are the bases themselves, with LoRAs beside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from tests.unit.bound_weights import base_weights, low_rank, one, random_lora, stack, versions
from tests.unit.diffusers_pair import lora
from tests.unit.fp8_bound import ARCH, CPU, MODULATION, NAMES, QKV, A, add, merged, output, recipe, scale_of
from tests.unit.fp8_simulation import Scheme, compiled_fp8, fused_modules, three_ways
from tests.unit.tiny_flux import call_inputs, tiny_transformer
from trt_core.backends.check import relative_l2
from trt_core.config import BaseWeights
from trt_core.fp8_recipe import is_modulation
from trt_core.fp8_weights import BasePlace, Fp8Weights, base_place
from trt_core.lora.changes import Difference, LowRank

LAYER = MODULATION.removesuffix(".weight")
EQUAL = 2e-4


def bound(source: dict[str, torch.Tensor] | None = None) -> Fp8Weights:
    place = base_place(BaseWeights.GPU, ARCH, recipe(), CPU, given_there=True)
    return Fp8Weights((base_weights() if source is None else source).items(), recipe(), place, CPU)


def change(rank: int = 4) -> LowRank:
    return low_rank(tuple(base_weights()[MODULATION].shape), rank, torch.Generator().manual_seed(5), 0.001)


def test_bases_on_the_gpu_alone_make_modulations_exact() -> None:
    """Bases in host memory leave eight bits on the GPU, which is what saves memory there."""
    places = {mode: base_place(mode, ARCH, recipe(), CPU, given_there=True) for mode in BaseWeights}
    assert [mode for mode, place in places.items() if place.exact_modulations] == [BaseWeights.GPU]
    assert not BasePlace(BaseWeights.HOST, 0).exact_modulations


def test_modulations_are_what_was_given_and_everything_else_is_fp8() -> None:
    given = base_weights()
    weights = bound(given)
    modulations = {f"{name}.weight" for name in recipe().linears if is_modulation(name)}
    assert len(modulations) == 2 * ARCH.double_depth + ARCH.single_depth
    for name in modulations:
        assert weights.tensors[name].data_ptr() == given[name].data_ptr()
        assert scale_of(name) not in weights.tensors
    assert weights.tensors[QKV].dtype is torch.float8_e4m3fn
    matrices = {f"{name}.weight" for name in recipe().linears} - modulations
    assert {name for name in weights.tensors if name.endswith("weight_scale")} == {scale_of(name) for name in matrices}


def test_a_lora_lies_beside_and_no_bit_is_written() -> None:
    weights, small = bound(), change()
    written = versions(weights)
    weights.refit(one(MODULATION, small, 0.5))
    assert versions(weights) == written
    assert weights.branches is not None
    delta = weights.branches.delta(LAYER)
    assert delta is not None
    wanted = (small.up.float() @ small.down.float()) * small.scale * 0.5
    assert float((delta - wanted).norm() / wanted.norm()) < 1e-5
    shown = weights.readable(MODULATION)
    assert shown is not None
    assert torch.equal(shown, (base_weights()[MODULATION].float() + delta).bfloat16())
    weights.restore()
    assert weights.readable(MODULATION) is weights.tensors[MODULATION]


def test_what_is_no_product_is_merged_and_undone() -> None:
    given = base_weights()
    weights, before = bound(given), base_weights()[MODULATION]
    weights.refit(one(MODULATION, Difference(torch.full_like(before, 0.5, dtype=torch.float32))))
    assert torch.equal(weights.tensors[MODULATION], (before.float() + 0.5).bfloat16())
    assert torch.equal(weights.base(MODULATION), before)
    weights.refit(one(MODULATION, change(), mark="product"))
    assert torch.equal(weights.tensors[MODULATION], before)
    assert weights.branches is not None
    weights.restore()
    assert torch.equal(given[MODULATION], before)


def test_any_way_to_a_stack_ends_in_the_same_bits() -> None:
    weights, fresh = bound(), bound()
    both = random_lora("both", NAMES, 2, seed=3)
    for loras in (((A, 1.0),), ((both, 0.3), (A, -1.0)), ((both, 0.7),)):
        weights.refit(stack(*loras))
    fresh.refit(stack((both, 0.7)))
    assert all(torch.equal(weights.tensors[n].float(), fresh.tensors[n].float()) for n in fresh.tensors)
    assert weights.branches is not None
    assert fresh.branches is not None
    assert torch.equal(weights.branches.down, fresh.branches.down)


def test_a_base_that_changed_in_place_is_followed_without_a_copy() -> None:
    weights = bound()
    weights.base(MODULATION).mul_(2.0)
    weights.quantize_again([MODULATION, QKV])
    assert torch.equal(weights.tensors[MODULATION], base_weights()[MODULATION] * 2)


# -- of a diffusers model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_equals_the_simulation_that_leaves_modulations_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = tiny_transformer(heads=4, head_dim=64).to(dtype)
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), tmp_path, base_weights="gpu")
    exact, rounded = (
        three_ways(ours, plain, Scheme(quantized_modulations=kind), call_inputs(plain)) for kind in (False, True)
    )
    if dtype is torch.float32:
        assert relative_l2(exact.ours, exact.simulated) <= EQUAL
        assert relative_l2(rounded.ours, rounded.simulated) > 5 * EQUAL
    error = relative_l2(exact.ours, exact.exact)
    assert error <= 1.2 * relative_l2(exact.simulated, exact.exact)


def test_a_models_loras_come_and_go_and_its_parameters_stay(tmp_path: Path) -> None:
    model: Any = compiled_fp8(tiny_transformer().to(torch.bfloat16), Scheme(), tmp_path, base_weights="gpu")
    before, parameters = output(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    add(model, "a", lora("norm.linear", "norm1.linear", "to_q"))
    with_a = output(model)
    assert not torch.equal(with_a, before)
    weights = model._trt_state.module.weights
    assert weights.branches is not None
    for name, layers in fused_modules(model).items():
        if is_modulation(name):
            whole, base = (torch.cat([merged(x, found) for x in layers]) for found in ({"a": 1.0}, {}))
            delta = weights.branches.delta(name)
            seen = torch.zeros_like(base) if delta is None else delta
            assert torch.allclose(seen, whole - base, rtol=0.02, atol=1e-6)
            assert torch.equal(weights.tensors[f"{name}.weight"].float(), base)
    model.delete_adapters("a")
    assert torch.equal(output(model), before)
    now = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(now[name], parameter) for name, parameter in parameters.items())


def test_a_modulation_changed_in_place_counts_from_the_next_call(tmp_path: Path) -> None:
    plain: FluxTransformer2DModel = tiny_transformer().to(torch.bfloat16)
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), tmp_path, base_weights="gpu")
    first = output(ours)
    for model in (ours, plain):
        with torch.no_grad():
            model.single_transformer_blocks[0].norm.linear.weight.mul_(3.0)
    seen = output(ours)
    assert not torch.equal(seen, first)
    assert torch.equal(seen, output(compiled_fp8(plain, Scheme(), tmp_path / "other", base_weights="gpu")))
