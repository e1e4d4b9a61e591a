"""Biases of FP8 layers whose mean input is known: what rounding takes from the mean output is given back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import base_weights, copied, differing, one, stack
from tests.unit.diffusers_pair import lora
from tests.unit.fp8_bound import ARCH, BIAS, CPU, GRANULARITIES, QKV, A, B, C, add, output, recipe
from tests.unit.tiny_flux import call_inputs, exact_inputs, run_diffusers, tiny_transformer
from trt_core import compile_transformer, dequantize_, quantize_fp8_
from trt_core.config import BaseWeights
from trt_core.errors import OutOfMemory
from trt_core.flux import fp8
from trt_core.flux.weights import weight_shapes
from trt_core.fp8_recipe import Fp8Config, Fp8Recipe, Granularity, plan_recipe
from trt_core.fp8_weights import Fp8Weights, base_place
from trt_core.host import Silent
from trt_core.lora.changes import Difference, Patch, merged
from trt_core.mutable_module import MutableTRTModule
from trt_core.weights import WeightPatches

LAYER = QKV.removesuffix(".weight")
CORRECTED = "corrected_bias"


def mean(layer: str) -> Tensor:
    """Another one for each layer."""
    width = weight_shapes(ARCH)[f"{layer}.weight"][1]
    return torch.randn(width, generator=torch.Generator().manual_seed(len(layer) + width)) + 0.5


def with_means(per_row: bool = True, *exclude: str) -> Fp8Recipe:
    config = Fp8Config(Granularity.ROW if per_row else Granularity.TENSOR, exclude=exclude)
    return plan_recipe(ARCH, config, None, {name: mean(name) for name in recipe().activation_linears})


def bound(per_row: bool = True, *exclude: str, given: dict[str, Tensor] | None = None) -> Fp8Weights:
    chosen = with_means(per_row, *exclude)
    place = base_place(BaseWeights.AUTO, ARCH, chosen, CPU, given_there=True)
    return Fp8Weights((base_weights() if given is None else given).items(), chosen, place, CPU)


def expected(weights: Fp8Weights, layer: str, whole: Tensor, bias: Tensor) -> Tensor:
    """The bias plus what is lost, from the tensors that products read."""
    q, scale = weights.tensors[f"{layer}.weight"], weights.tensors[f"{layer}.weight_scale"]
    return bias.float() + (whole.float() - q.float() * scale) @ mean(layer)


def is_corrected(weights: Fp8Weights, layer: str, whole: Tensor, bias: Tensor) -> bool:
    seen = weights.tensors[f"{layer}.{CORRECTED}"]
    return seen.dtype is bias.dtype and torch.allclose(
        seen.float(), expected(weights, layer, whole, bias), rtol=2**-8, atol=1e-5
    )


@GRANULARITIES
def test_every_layer_reads_its_bias_and_what_is_lost(per_row: bool) -> None:
    weights, given = bound(per_row), base_weights()
    layers = recipe().activation_linears
    for layer in layers:
        assert is_corrected(weights, layer, given[f"{layer}.weight"], given[f"{layer}.bias"]), layer
        assert not torch.equal(weights.tensors[f"{layer}.{CORRECTED}"], given[f"{layer}.bias"])
        assert torch.equal(weights.tensors[f"{layer}.bias"], given[f"{layer}.bias"]), "the bias itself stays"
    assert {n.removesuffix(f".{CORRECTED}") for n in weights.tensors if n.endswith(CORRECTED)} == layers
    assert weights.base_names == list(given)


def test_the_mean_output_is_exact_but_for_the_biass_own_rounding() -> None:
    """Of inputs with this mean: 50 times nearer than without."""
    weights, given = bound(), base_weights()
    q, scale = weights.tensors[QKV], weights.tensors[f"{LAYER}.weight_scale"]
    true = given[QKV].float() @ mean(LAYER) + given[f"{LAYER}.bias"].float()
    plain, ours = (
        fp8.dequantize(q, scale, torch.float32) @ mean(LAYER) + weights.tensors[f"{LAYER}.{name}"].float()
        for name in ("bias", CORRECTED)
    )
    assert float((ours - true).norm()) < 0.1 * float((plain - true).norm())


def test_excluded_layers_and_recipes_without_means_read_their_biases() -> None:
    weights = bound(True, "*.linear2")
    assert f"single_blocks.0.linear2.{CORRECTED}" not in weights.tensors
    assert f"single_blocks.0.linear1.{CORRECTED}" in weights.tensors
    place = base_place(BaseWeights.AUTO, ARCH, recipe(), CPU, given_there=True)
    plain = Fp8Weights(base_weights().items(), recipe(), place, CPU)
    assert not [name for name in plain.tensors if name.endswith(CORRECTED)]


@GRANULARITIES
@pytest.mark.parametrize("loras", [((A, 1.0),), ((A, 0.5), (B, -1.0)), ((C, 0.3),)], ids=["one", "two", "modulations"])
def test_a_merge_makes_the_correction_anew(loras: Any, per_row: bool) -> None:
    weights, before, patches = bound(per_row), bound(per_row), stack(*loras)
    weights.refit(patches)
    for layer in recipe().activation_linears:
        name, given = f"{layer}.weight", base_weights()
        whole = merged(given[name], patches[name].patches) if name in patches else given[name]
        assert is_corrected(weights, layer, whole, given[f"{layer}.bias"]), layer
    weights.restore()
    assert differing(weights, copied(before)) == []


def test_any_way_to_a_stack_ends_in_the_same_bits() -> None:
    weights, fresh = bound(), bound()
    for loras in (((A, 1.0),), ((B, 0.3), (A, -1.0)), ((C, 0.7),), ((B, 0.8),)):
        weights.refit(stack(*loras))
    fresh.refit(stack((B, 0.8)))
    assert differing(weights, copied(fresh)) == []


def test_a_lora_on_a_bias_is_added_to_the_correction() -> None:
    weights, diff = bound(), torch.full((64,), 0.25)
    layer = BIAS.removesuffix(".bias")
    weights.refit(one(BIAS, Difference(diff)))
    assert torch.equal(weights.tensors[BIAS], (base_weights()[BIAS].float() + 0.25).bfloat16())
    assert is_corrected(weights, layer, base_weights()[f"{layer}.weight"], weights.tensors[BIAS])
    weights.restore()
    assert differing(weights, copied(bound())) == []


def test_a_refit_that_fails_leaves_the_corrections_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's bits, and what a LoRA had made."""
    weights, base = bound(), bound()
    weights.refit(stack((B, 0.8)))
    before = copied(weights)
    later = [name for name in stack((A, 1.0)) if name not in stack((B, 0.8)) and "_mod." not in name]
    real = Fp8Weights._write

    def fails(self: Fp8Weights, name: str, *rest: Any) -> None:
        real(self, name, *rest)
        if name == later[-1]:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Fp8Weights, "_write", fails)
    with pytest.raises(OutOfMemory):
        weights.refit(stack((A, 1.0)))
    monkeypatch.undo()
    touched = set(stack((B, 0.8)))
    for name in differing(weights, before):
        assert f"{name.rpartition('.')[0]}.weight" in touched
        assert torch.allclose(weights.tensors[name].float(), before[name].float(), rtol=2**-7, atol=1e-5)
    untouched = {n: t for n, t in copied(base).items() if f"{n.rpartition('.')[0]}.weight" not in touched}
    assert untouched.keys() & set(differing(weights, copied(base))) == set()


@pytest.mark.parametrize("kind", ["the matrix", "the bias"])
def test_bases_that_somebody_changed_are_followed(kind: str) -> None:
    given = base_weights()
    weights = bound(given=given)
    name = QKV if kind == "the matrix" else f"{LAYER}.bias"
    given[name].mul_(1.5)
    weights.quantize_again([name])
    assert is_corrected(weights, LAYER, given[QKV], given[f"{LAYER}.bias"])
    assert differing(weights, copied(bound(given=given))) == []


def test_a_base_that_changed_under_a_lora_has_its_own_correction_without_it() -> None:
    given = base_weights()
    weights = bound(given=given)
    weights.refit(stack((A, 1.0)))
    given[QKV].mul_(1.5)
    weights.quantize_again([QKV])
    weights.restore()
    assert differing(weights, copied(bound(given=given))) == []


def test_blocks_are_given_the_corrected_bias() -> None:
    module = MutableTRTModule(ARCH)
    module.load_fp8(base_weights(), with_means(), CPU, lambda name, base: None)
    read = {t.data_ptr() for block in (*module._double_weights, *module._single_weights)
            for t in (*block.before, *block.after)}  # fmt: skip
    tensors = module.weights.tensors
    for layer in recipe().activation_linears:
        assert tensors[f"{layer}.{CORRECTED}"].data_ptr() in read
        assert tensors[f"{layer}.bias"].data_ptr() not in read


def test_a_difference_among_low_rank_patches() -> None:
    """What kernels cannot merge is corrected as well."""
    weights, change = bound(), Difference(torch.full(base_weights()[QKV].shape, 0.01))
    weights.refit({QKV: WeightPatches("both", (*stack((A, 1.0))[QKV].patches, (Patch(QKV, None, change), 1.0)))})
    whole = merged(base_weights()[QKV], weights._applied[QKV].patches)
    assert is_corrected(weights, LAYER, whole, base_weights()[f"{LAYER}.bias"])


# -- of a diffusers model ----------------------------------------------------------------------------------------------


def compiled(model: Any, cache: Path, calibration: Any = None) -> Any:
    quantize_fp8_(model, calibration=calibration, progress=Silent())
    return compile_transformer(model, backend="eager", cache_folder=str(cache), progress=Silent())


def mean_error(model: Any, plain: Any) -> float:
    """Of the outputs' mean over tokens, over several calls: what all tokens have in common."""
    lost = []
    for seed in range(6):
        inputs = call_inputs(plain, seed=seed, height=8)
        truth = run_diffusers(copy.deepcopy(plain).float(), exact_inputs(inputs))
        lost.append((run_diffusers(model, inputs).float() - truth).mean(1))
    return float(torch.stack(lost).mean(0).norm())


def test_calibrated_models_err_less_in_the_mean(tmp_path: Path) -> None:
    plain = tiny_transformer(heads=4, head_dim=64)
    calls = [exact_inputs(call_inputs(plain, seed=100 + seed, height=8)) for seed in range(4)]
    without = mean_error(compiled(copy.deepcopy(plain), tmp_path), plain)
    corrected = mean_error(compiled(copy.deepcopy(plain), tmp_path, calls), plain)
    assert corrected < 0.8 * without


def test_a_models_loras_come_and_go_with_corrected_biases(tmp_path: Path) -> None:
    plain = tiny_transformer().to(torch.bfloat16)
    calls = [call_inputs(plain, seed=seed) for seed in (1, 2)]
    ours = compiled(copy.deepcopy(plain), tmp_path, calls)
    before, biases = output(ours), {n: p.detach().clone() for n, p in ours.named_parameters() if n.endswith("bias")}
    add(ours, "a", lora("to_q", "proj_out"))
    with_a = output(ours)
    assert not torch.equal(with_a, before)
    ours.disable_adapters()
    assert torch.equal(output(ours), before)
    ours.enable_adapters()
    assert torch.equal(output(ours), with_a)
    ours.delete_adapters("a")
    assert torch.equal(output(ours), before)
    now = {name.replace(".base_layer", ""): parameter for name, parameter in ours.named_parameters()}
    assert all(torch.equal(now[name], bias) for name, bias in biases.items())
    dequantize_(ours)
    assert torch.equal(output(ours), output(plain))


def test_a_bias_changed_in_place_counts_from_the_next_call(tmp_path: Path) -> None:
    plain = tiny_transformer().to(torch.bfloat16)
    calls = [call_inputs(plain, seed=seed) for seed in (1, 2)]
    ours = compiled(copy.deepcopy(plain), tmp_path, calls)
    first = output(ours)
    with torch.no_grad():
        ours.single_transformer_blocks[0].proj_out.bias.add_(1.0)
    assert not torch.equal(output(ours), first)
    with torch.no_grad():
        ours.single_transformer_blocks[0].proj_out.bias.sub_(1.0)
    again = output(ours)
    assert torch.allclose(again.float(), first.float(), rtol=0.05, atol=0.05)
