"""LoRAs on FP8 models through diffusers' and PEFT's own calls: merged into the base, rounded once, undone exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftConfig

from tests.unit.diffusers_pair import ATTENTION, lora
from tests.unit.fp8_bound import GRANULARITIES, add, bound_tensors, changed, fp8_model, is_merged, output, same
from tests.unit.fp8_simulation import (
    BLOCK_LINEARS,
    Scheme,
    compiled_fp8,
    dequantized,
    fused_layers,
    fused_modules,
    is_modulation,
    simulation,
    widened,
)
from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core.backends.check import relative_l2

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
EQUAL = 2e-4


# -- merged bit for bit ------------------------------------------------------------------------------------------------


@GRANULARITIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 0.0, 4.0])
def test_merged_is_round_fp8_of_base_plus_delta(
    strength: float, dtype: torch.dtype, per_row: bool, tmp_path: Path
) -> None:
    model = fp8_model(tmp_path, per_row, dtype=dtype)
    output(model)
    base = bound_tensors(model)
    add(model, "a", lora(*BLOCK_LINEARS))
    model.set_adapters("a", strength)
    output(model)
    assert is_merged(model, {"a": strength}, per_row)
    assert changed(bound_tensors(model), base) == (set(fused_layers(model)) if strength else set())


@GRANULARITIES
def test_several_adapters_on_the_same_layers(per_row: bool, tmp_path: Path) -> None:
    model = fp8_model(tmp_path, per_row)
    add(model, "a", lora("to_q", "to_k", "proj_mlp"))
    add(model, "b", lora("to_k", "to_v", rank=8), seed=12)
    add(model, "c", lora("to_k", "norm.linear"), seed=13)
    strengths = {"a": 1.0, "b": 0.25, "c": -0.5}
    model.set_adapters(list(strengths), list(strengths.values()))
    output(model)
    assert is_merged(model, strengths, per_row)
    model.set_adapters(["a", "c"], [0.0, 2.0])
    output(model)
    assert is_merged(model, {"a": 0.0, "c": 2.0}, per_row)


def test_rows_of_a_fused_weight_that_no_lora_touches_keep_their_bits(tmp_path: Path) -> None:
    model = fp8_model(tmp_path)
    output(model)
    before = bound_tensors(model)["single_blocks.0.linear1.weight"].float()
    add(model, "a", lora("to_k"))
    output(model)
    after = bound_tensors(model)["single_blocks.0.linear1.weight"].float()
    assert is_merged(model, {"a": 1.0}, per_row=True)
    hidden = 64
    rows = (before != after).any(1).nonzero().flatten()
    assert rows.tolist() == list(range(hidden, 2 * hidden))


def test_output_is_that_of_the_merged_model_in_fp8(tmp_path: Path) -> None:
    model = fp8_model(tmp_path, dtype=torch.float32)
    add(model, "a", lora(*BLOCK_LINEARS))
    plain = tiny_transformer()
    add(plain, "a", lora(*BLOCK_LINEARS))
    plain.fuse_lora()
    plain.unload_lora()
    expected = simulation(plain, Scheme(), tiny_transformer())
    inputs = call_inputs(plain)
    assert relative_l2(run_diffusers(model, inputs), run_diffusers(expected, inputs)) <= EQUAL
    assert relative_l2(run_diffusers(tiny_transformer(), inputs), run_diffusers(expected, inputs)) > 0.01


def test_only_what_changes_is_written(tmp_path: Path) -> None:
    model = fp8_model(tmp_path)
    add(model, "a", lora(*ATTENTION))
    add(model, "b", lora("norm1.linear"), seed=12)
    model.set_adapters("a")
    output(model)
    first = model.trt_report().last_refit
    assert (first.merged, first.layers) == (4, 4)
    output(model)
    assert model.trt_report().last_refit is first
    model.set_adapters("b")
    output(model)
    refit = model.trt_report().last_refit
    assert (refit.merged, refit.restored) == (2, 4)
    assert model.trt_report().builds == 1


def test_a_new_adapter_does_not_quantize_the_model_again(tmp_path: Path) -> None:
    """Only what a LoRA touched is restored; the other weights are neither written nor moved."""
    model: Any = fp8_model(tmp_path)
    add(model, "a", lora("to_q"))
    output(model)
    tensors = dict(model._trt_state.module.weights.tensors)
    written = {name: tensor._version for name, tensor in tensors.items()}
    add(model, "b", lora("proj_mlp"), seed=12)
    model.state_dict()
    output(model)
    now = model._trt_state.module.weights.tensors
    assert all(now[name] is tensor for name, tensor in tensors.items())
    rewritten = {name for name, tensor in tensors.items() if tensor._version != written[name]}
    layers = ("double_blocks.0.img_attn.qkv", "double_blocks.1.img_attn.qkv", "single_blocks.0.linear1",
              "single_blocks.1.linear1")  # fmt: skip
    assert rewritten == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "weight_scale")}


# -- other kinds of adapters, merged by their own formulas -------------------------------------------------------------

KINDS: dict[str, Callable[[], PeftConfig]] = {
    "DoRA": lambda: lora(*BLOCK_LINEARS, use_dora=True),
    "LoHa": lambda: LoHaConfig(r=4, alpha=4, target_modules=BLOCK_LINEARS, init_weights=False),
    "LoKr": lambda: LoKrConfig(r=4, alpha=4, target_modules=BLOCK_LINEARS, init_weights=False),
    "rank-stabilised": lambda: lora(*BLOCK_LINEARS, use_rslora=True),
    "bias": lambda: lora(*BLOCK_LINEARS, lora_bias=True),
}
BESIDE = ("rank-stabilised", "bias")
"""Those that are low-rank products, which are added to modulations and not merged into them."""


@GRANULARITIES
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_what_peft_merges(kind: str, per_row: bool, tmp_path: Path) -> None:
    """PEFT merges into fp32 weights; the last bit of its sums may differ from ours, and with it a rounding or two."""
    model = fp8_model(tmp_path, per_row, dtype=torch.float32)
    output(model)
    base = bound_tensors(model)
    add(model, "a", KINDS[kind]())
    output(model)
    tensors = bound_tensors(model)
    theirs = tiny_transformer()
    add(theirs, "a", KINDS[kind]())
    for name, layers in fused_modules(theirs).items():
        for layer in layers:
            layer.merge()
        weights, biases = zip(*((layer.base_layer.weight, layer.base_layer.bias) for layer in layers), strict=True)
        fused = torch.cat([weight.detach() for weight in weights])
        seen, expected = widened(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]), fused
        if is_modulation(name) and kind in BESIDE:
            before = torch.cat([layer.weight.detach() for layer in fused_layers(tiny_transformer())[name]])
            assert float((tensors[f"{name}.beside"] - (fused - before)).norm() / (fused - before).norm()) < 1e-2, name
            expected = before
        assert float((seen - dequantized(name, expected, per_row)).norm() / fused.norm()) < 2e-3, name
        assert torch.allclose(tensors[f"{name}.bias"], torch.cat(biases).detach(), rtol=1e-5, atol=1e-5)
    assert changed(tensors, base) >= set(fused_layers(model))
    assert model.trt_report().eager_blocks == {}
    model.unload_lora()
    output(model)
    assert same(bound_tensors(model), base)


# -- switching ---------------------------------------------------------------------------------------------------------


@GRANULARITIES
def test_a_to_b_is_a_fresh_b_and_none_is_the_base(per_row: bool, tmp_path: Path) -> None:
    model, fresh = fp8_model(tmp_path, per_row), fp8_model(tmp_path, per_row)
    first = output(model)
    base = bound_tensors(model)
    add(model, "a", lora(*BLOCK_LINEARS))
    with_a = output(model)
    for one in (model, fresh):
        if one is fresh:
            add(one, "a", lora(*BLOCK_LINEARS))
        add(one, "b", lora("to_q", "ff.net.2", "norm.linear", rank=8), seed=12)
    assert torch.equal(output(model), output(fresh))
    assert same(bound_tensors(model), bound_tensors(fresh))
    assert changed(bound_tensors(model), base) == {
        *(f"double_blocks.{i}.img_{n}" for i in range(2) for n in ("attn.qkv", "mlp.2")),
        *(f"single_blocks.{i}.{n}" for i in range(2) for n in ("linear1", "modulation.lin")),
    }
    model.set_adapters("a")
    assert torch.equal(output(model), with_a)
    model.disable_adapters()
    assert torch.equal(output(model), first)
    assert same(bound_tensors(model), base)
    model.unload_lora()
    assert torch.equal(output(model), first)
    assert same(bound_tensors(model), base)


def test_fifty_random_switches_drift_by_nothing(tmp_path: Path) -> None:
    model, choices = fp8_model(tmp_path), random.Random(1)
    first = output(model)
    base = bound_tensors(model)
    add(model, "a", lora(*BLOCK_LINEARS))
    add(model, "b", lora("to_k", "norm.linear", "ff_context.net.2", rank=8), seed=12)
    for _ in range(50):
        names = choices.sample(["a", "b"], choices.randint(1, 2))
        strengths = [choices.choice([-1.0, 0.0, 0.3, 1.0]) for _ in names]
        model.set_adapters(names, strengths)
        model._trt_state.prepare()
    assert is_merged(model, dict(zip(names, strengths, strict=True)), per_row=True)
    model.disable_adapters()
    assert torch.equal(output(model), first)
    assert same(bound_tensors(model), base)
    assert model.trt_report().builds == 1


def test_parameters_show_the_base_under_a_lora(tmp_path: Path) -> None:
    model, plain = fp8_model(tmp_path), tiny_transformer().bfloat16()
    add(model, "a", lora(*BLOCK_LINEARS))
    output(model)
    expected = dict(plain.named_parameters())
    shown = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(shown[n], p) and shown[n].dtype is torch.bfloat16 for n, p in expected.items())
    saved = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items() if "lora_" not in n}
    assert all(torch.equal(saved[n], t) for n, t in plain.state_dict().items())


def test_fuse_and_unfuse_are_diffusers_own(tmp_path: Path) -> None:
    """Fused, an adapter is part of the base, which is then rounded as any other base is."""
    model = fp8_model(tmp_path, dtype=torch.float32)
    add(model, "a", lora())
    output(model)
    model.fuse_lora(lora_scale=0.7)
    fused = output(model)
    assert model.trt_report().last_refit.merged == 0
    plain = tiny_transformer()
    add(plain, "a", lora())
    plain.fuse_lora(lora_scale=0.7)
    plain.unload_lora()
    assert torch.equal(fused, output(compiled_fp8(plain, Scheme(), tmp_path)))
    model.unfuse_lora()
    output(model)
    assert is_merged(model, {"a": 0.7}, per_row=True), "diffusers leaves the scale in its layers"


def test_adapters_merged_behind_diffusers_back_are_followed(tmp_path: Path) -> None:
    """PEFT's `merge` on the layers themselves: what was merged by us must not be there twice."""
    model = fp8_model(tmp_path, dtype=torch.float32)
    add(model, "a", lora("to_q"))
    output(model)
    for layers in fused_modules(model).values():
        for layer in layers:
            if hasattr(layer, "merge"):
                layer.merge()
    output(model)
    assert is_merged(model, {}, per_row=True), "the bases hold the adapter now"


def test_the_scale_argument(tmp_path: Path) -> None:
    model = fp8_model(tmp_path)
    add(model, "a", lora(*BLOCK_LINEARS))
    inputs = call_inputs(model)
    for scale in (0.3, -0.5):
        run_diffusers(model, inputs, joint_attention_kwargs={"scale": scale})
        assert is_merged(model, {"a": scale}, per_row=True)
    output(model)
    assert is_merged(model, {"a": 1.0}, per_row=True)


def test_an_adapter_that_is_swapped_in_place(tmp_path: Path) -> None:
    """diffusers' hotswap writes other factors into the tensors of an adapter that is applied."""
    model, donor = fp8_model(tmp_path), tiny_transformer().bfloat16()
    add(donor, "a", lora("to_q", "proj_mlp"), seed=12)
    donor.save_lora_adapter(tmp_path / "other", adapter_name="a")
    add(model, "a", lora("to_q", "proj_mlp"))
    before = output(model)
    model.load_lora_adapter(
        str(tmp_path / "other"), weight_name="pytorch_lora_weights.safetensors", adapter_name="a", prefix=None,
        hotswap=True, local_files_only=True,
    )  # fmt: skip
    assert relative_l2(output(model), before) > 1e-3
    assert is_merged(model, {"a": 1.0}, per_row=True)
