"""LoRAs on a real-shaped FLUX in FP8: merged as they should be, exact from switch to switch, whole on arrival."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import trt_core
from tests.unit.fp8_lora_gain import lora_gain, rounded_bases
from tests.unit.fp8_simulation import (
    BLOCK_LINEARS,
    Scheme,
    compiled_fp8,
    fused_modules,
    is_modulation,
    round_weight,
)
from trt_core.backends.check import relative_l2

from .conftest import inputs_of, output_of, real_shaped_model
from .fp8_models import BACKENDS, PLACES, TARGETS, add, bound, fp8, real_shaped, same

pytestmark = pytest.mark.usefixtures("needs_fp8_gpu")


@PLACES
@pytest.mark.parametrize("per_row", [True, False], ids=["row", "tensor"])
def test_merged_is_round_fp8_of_base_plus_delta(per_row: bool, place: str, cache_folder: str) -> None:
    """Products on the GPU, everything after them on the CPU, where a division is a division.

    Per row, tensor cores sum the products in another order than PyTorch: the last bit of the fp32 sum may differ.
    Modulations keep their base's bits, exact where bases are on the GPU, with the LoRA beside them.
    """
    model = compiled_fp8(real_shaped_model(), Scheme(per_row), cache_folder, base_weights=place)
    add(model, "a", *BLOCK_LINEARS)
    for strength in (1.0, -0.5, 0.0):
        model.set_adapters("a", strength)
        output_of(model, inputs_of(real_shaped_model()))
        tensors = bound(model)
        for name, layers in fused_modules(model).items():
            beside = is_modulation(name)
            whole, base = (torch.cat([_merged(layer, s) for layer in layers]) for s in (strength, 0.0))
            if beside and strength != 0:
                delta = model._trt_state.module.weights.branches.delta(name).cpu()
                assert relative_l2(delta, whole - base) < 3e-3, name
            if beside and place == "gpu":
                assert torch.equal(tensors[f"{name}.weight"].cpu().float(), base), name
                continue
            q, scale = round_weight(name, base if beside else whole, per_row)
            assert tensors[f"{name}.weight"].dtype is q.dtype
            seen, seen_scale = tensors[f"{name}.weight"].cpu(), tensors[f"{name}.weight_scale"].cpu()
            if per_row and strength != 0 and not beside:
                assert torch.allclose(seen_scale, scale, rtol=3e-6), name
                assert (seen.float() != q.float()).float().mean() < 1e-3, name
                assert relative_l2(seen.float() * seen_scale, q.float() * scale) < 1e-3, name
            else:
                assert torch.equal(seen.float(), q.float()), name
                assert torch.equal(seen_scale, scale), name


def _merged(layer: nn.Module, strength: float) -> Tensor:
    up, down = (factor["a"].weight.detach().cuda().float() for factor in (layer.lora_B, layer.lora_A))
    delta = (up @ down).cpu()
    return layer.base_layer.weight.detach().cpu().float() + delta * (strength * layer.lora_alpha["a"] / layer.r["a"])


@BACKENDS
def test_lora_switches_are_exact(backend: str, cache_folder: str) -> None:
    """A to B is a fresh B, A to none is the base, matrices from the GPU and from host memory agree: bit for bit."""
    matrices_of_b: dict[str, dict[str, Tensor]] = {}
    for place in ("gpu", "host"):
        model, arguments = fp8(cache_folder, place, backend=backend), inputs_of(real_shaped_model())
        seen = {"none": output_of(model, arguments)}
        base = bound(model)
        add(model, "a", *TARGETS)
        add(model, "b", *TARGETS[1:4], seed=12)
        model.set_adapters("b")
        seen["b"] = output_of(model, arguments)
        fresh_b = bound(model)
        for adapters, strengths in ((["a"], [1.0]), (["a", "b"], [0.5, -1.0]), (["a"], [1.0])):
            model.set_adapters(adapters, strengths)
            seen["a"] = output_of(model, arguments)
        assert not torch.equal(seen["a"], seen["b"])
        for _ in range(25):
            model.set_adapters("a")
            assert torch.equal(output_of(model, arguments), seen["a"])
            model.set_adapters("b")
            assert torch.equal(output_of(model, arguments), seen["b"])
        assert same(bound(model), fresh_b)
        model.disable_adapters()
        assert torch.equal(output_of(model, arguments), seen["none"])
        assert same(bound(model), base)
        assert model.trt_report().builds == 1
        matrices_of_b[place] = {n: t for n, t in fresh_b.items() if not is_modulation(n.rpartition(".")[0])}
    assert same(matrices_of_b["gpu"], matrices_of_b["host"])


@PLACES
def test_corrected_biases_come_and_go_with_loras(place: str, cache_folder: str) -> None:
    """Each is the bias and what rounding took from the mean output; A to B is a fresh B, and none is the base."""
    model = real_shaped_model()
    calls = [inputs_of(model, seed=seed) for seed in (5, 6)]
    recipe = trt_core.quantize_fp8_(model, calibration=calls)
    trt_core.compile_transformer(model, backend="eager", base_weights=place, cache_folder=cache_folder)
    arguments = inputs_of(real_shaped_model())
    none, base = output_of(model, arguments), bound(model)
    add(model, "a", *BLOCK_LINEARS)
    add(model, "b", *TARGETS[1:4], seed=12)
    model.set_adapters("b")
    output_of(model, arguments)
    fresh_b = bound(model)
    model.set_adapters("a")
    output_of(model, arguments)
    tensors = bound(model)
    for name, layers in fused_modules(model).items():
        if is_modulation(name):
            continue
        whole = torch.cat([_merged(layer, 1.0) for layer in layers]).cuda()
        rounded = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        lost = (whole - rounded) @ recipe.input_mean[name].cuda()
        seen = tensors[f"{name}.corrected_bias"].float() - tensors[f"{name}.bias"].float()
        assert float(lost.norm()) > 0
        # bf16 rounds the corrected bias, and 0.1 % of the E4M3 numbers may be neighbours of the GPU's.
        assert float((seen - lost).norm()) <= 0.1 * float(lost.norm()) + 2**-8 * float(
            tensors[f"{name}.bias"].float().norm()
        ), name
    model.set_adapters("b")
    output_of(model, arguments)
    assert same(bound(model), fresh_b)
    model.disable_adapters()
    assert torch.equal(output_of(model, arguments), none)
    assert same(bound(model), base)


@pytest.mark.parametrize(("size", "loras"), [(0.005, 12), (0.01, 8), (0.05, 3)])
def test_the_gain_of_a_small_lora_is_one(size: float, loras: int, cache_folder: str) -> None:
    plain = real_shaped(heads=8)
    calls = [inputs_of(plain, seed=seed) for seed in range(3)]
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), cache_folder)
    assert 0.97 <= lora_gain(ours, plain.float(), calls, size, loras) <= 1.03


def test_merging_into_the_rounded_weight_would_lose_it(cache_folder: str) -> None:
    """But for what a LoRA does to modulations, which arrives beside them."""
    plain = real_shaped(heads=8)
    calls = [inputs_of(plain, seed=seed) for seed in range(3)]
    ours = compiled_fp8(rounded_bases(plain, True), Scheme(), cache_folder)
    assert lora_gain(ours, plain.float(), calls, 0.005, 3) < 0.8
