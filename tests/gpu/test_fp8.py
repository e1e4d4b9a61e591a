"""A real-shaped FLUX in FP8: the simulation's error, exact LoRA switches, and bases on the GPU or in host memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trt_core
from benchmarks.fake_quant import FakeAttention
from tests.unit.diffusers_pair import lora
from tests.unit.fp8_lora_gain import lora_gain, rounded_bases
from tests.unit.fp8_simulation import (
    BLOCK_LINEARS,
    Scheme,
    compiled_fp8,
    fused_layers,
    fused_modules,
    is_modulation,
    largest_inputs,
    round_weight,
    simulation,
    three_ways,
)
from tests.unit.tiny_flux import exact_inputs, run_diffusers, tiny_transformer
from trt_core import plan_search
from trt_core.attention_ranking import why_not_fp8_attention
from trt_core.backends.check import relative_l2
from trt_core.flux.catalogue import BlockKind
from trt_core.fp8_recipe import attach_recipe, detach_recipe
from trt_core.gpu import current_gpu, why_not_fp8

from .conftest import inputs_of, output_of, real_shaped_model

RATIO_BOUND = 1.2
COSINE_BOUND = 0.995
BACKENDS = pytest.mark.parametrize("backend", ["eager", "inductor"])
needs_fp8_attention = pytest.mark.skipif(
    not torch.cuda.is_available() or why_not_fp8_attention(torch.device("cuda", 0), 128) is not None,
    reason="needs nvidia-cudnn-frontend and compute capability 9.0",
)
PLACES = pytest.mark.parametrize("place", ["gpu", "host"])
TARGETS = ("to_q", "to_k", "add_v_proj", "ff.net.2", "proj_mlp", "norm.linear", "norm1.linear")


@pytest.fixture(autouse=True)
def _needs_fp8() -> None:
    if reason := why_not_fp8(current_gpu()):
        pytest.skip(reason)


def real_shaped(adversarial: bool = False, **sizes: int) -> Any:
    wanted = {"heads": 2, "head_dim": 128, "double": 1, "single": 2, **sizes}
    return tiny_transformer(**wanted, adversarial=adversarial).to("cuda", torch.bfloat16)


def static(model: Any, **options: Any) -> Scheme:
    calls = [exact_inputs(inputs_of(model, seed=seed)) for seed in (1, 2, 3)]
    return Scheme(input_amax=largest_inputs(copy.deepcopy(model).float(), calls), **options)


def fp8(cache: Any, place: str = "gpu", **options: Any) -> Any:
    return compiled_fp8(real_shaped_model(), Scheme(), cache, base_weights=place, **options)


def add(model: Any, name: str, *targets: str, seed: int = 11) -> None:
    """The same adapter for the same seed, wherever the base lies."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.add_adapter(lora(*targets), adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in model.named_parameters():
            if "lora_" in path and f".{name}." in path:
                values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
                parameter.data = values.to(parameter.device, parameter.dtype)


def matrices(model: Any) -> list[Tensor]:
    return [layer.weight for layers in fused_layers(model).values() for layer in layers]


def bound(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model._trt_state.module.weights.tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n].float(), other[n].float()) for n in one)


# -- the same error as the simulation ----------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
@pytest.mark.parametrize("kind", ["row", "tensor", "row static", "tensor static"])
def test_error_is_the_simulations(kind: str, adversarial: bool, backend: str, cache_folder: str) -> None:
    plain = real_shaped(adversarial)
    per_row = kind.startswith("row")
    scheme = static(plain, per_row=per_row) if kind.endswith("static") else Scheme(per_row)
    ours = compiled_fp8(copy.deepcopy(plain), scheme, cache_folder, backend=backend, attention="cudnn")
    for sizes in ({}, {"height": 24, "width": 30}, {"batch": 2}):
        found = three_ways(ours, plain, scheme, inputs_of(plain, **sizes))
        simulated = relative_l2(found.simulated, found.exact)
        assert simulated > 0.004
        assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * simulated
        cosine = torch.nn.functional.cosine_similarity(found.ours.flatten(), found.exact.flatten(), dim=0)
        assert float(cosine) >= COSINE_BOUND
    assert ours.trt_report().builds == 1


@BACKENDS
def test_excluded_layers_stay_in_bf16(backend: str, cache_folder: str) -> None:
    plain = real_shaped()
    scheme = Scheme(
        patterns=("single_blocks.0.linear2", "*.txt_mlp.?"),
        excluded=frozenset({"single_blocks.0.linear2", "double_blocks.0.txt_mlp.0", "double_blocks.0.txt_mlp.2"}),
    )
    ours = compiled_fp8(copy.deepcopy(plain), scheme, cache_folder, backend=backend, attention="cudnn")
    found = three_ways(ours, plain, scheme, inputs_of(plain))
    assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * relative_l2(found.simulated, found.exact)
    tensors = ours._trt_state.module.weights.tensors
    exact = scheme.excluded | {n for n in fused_layers(plain) if is_modulation(n)}
    assert {n for n in fused_layers(plain) if tensors[f"{n}.weight"].dtype is torch.bfloat16} == exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@BACKENDS
def test_other_dtypes(backend: str, dtype: torch.dtype, cache_folder: str) -> None:
    plain = real_shaped().to(dtype)
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), cache_folder, backend=backend)
    found = three_ways(ours, plain, Scheme(), inputs_of(plain))
    assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * relative_l2(found.simulated, found.exact)


@needs_fp8_attention
@pytest.mark.parametrize("kind", ["row", "row static"])
def test_attention_in_fp8_has_the_simulations_error(kind: str, cache_folder: str) -> None:
    """The simulation rounds q, k, v, probabilities and attention's result as well."""
    plain = real_shaped()
    scheme = static(plain) if kind.endswith("static") else Scheme()
    ours = compiled_fp8(copy.deepcopy(plain), scheme, cache_folder, backend="inductor", attention="fp8")
    for sizes in ({}, {"height": 24, "width": 30}, {"batch": 2}):
        arguments = inputs_of(plain, **sizes)
        exact = exact_inputs(arguments)
        truth = run_diffusers(copy.deepcopy(plain).float(), exact)
        with FakeAttention():
            simulated = relative_l2(run_diffusers(simulation(plain, scheme), exact), truth)
        seen = run_diffusers(ours, arguments).float()
        assert relative_l2(seen, truth) <= RATIO_BOUND * simulated
        assert float(torch.nn.functional.cosine_similarity(seen.flatten(), truth.flatten(), dim=0)) >= COSINE_BOUND
    assert "fp8 attention" in str(ours.trt_report().segments)
    assert ours.trt_report().builds == 1


@needs_fp8_attention
def test_sharp_norms_keep_attention_in_bf16(cache_folder: str) -> None:
    """q/k gains of 3: auto does not take FP8 attention, however fast it is."""
    ours = compiled_fp8(real_shaped(adversarial=True), Scheme(), cache_folder, backend="inductor")
    output_of(ours, inputs_of(real_shaped(), height=64, width=64))
    assert "fp8 attention" not in str(ours.trt_report().segments)


@BACKENDS
def test_products_in_bf16_have_no_error_of_their_own(
    backend: str, cache_folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Where they measure faster; here because the ranking says so. Inputs are not rounded then."""
    plain, arguments = real_shaped(), inputs_of(real_shaped())
    errors = []
    for wide in (frozenset(BlockKind), frozenset()):
        monkeypatch.setattr(plan_search, "rank_products", lambda compiler, wide=wide: (wide, []))
        folder = tmp_path / str(len(wide))
        ours = compiled_fp8(copy.deepcopy(plain), Scheme(), folder, backend=backend, attention="cudnn")
        found = three_ways(ours, plain, Scheme(), arguments)
        errors.append(relative_l2(found.ours, found.exact))
        assert ("products not in fp8" in str(ours.trt_report().segments)) is bool(wide)
    assert errors[0] < 0.9 * errors[1]


# -- LoRAs -------------------------------------------------------------------------------------------------------------


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


# -- where the bases lie -----------------------------------------------------------------------------------------------


def test_bases_in_host_memory_leave_the_gpu(cache_folder: str) -> None:
    model, arguments = fp8(cache_folder, "host"), inputs_of(real_shaped_model())
    output_of(model, arguments)
    assert all(p.device.type == "cpu" and p.is_pinned() for p in matrices(model))
    assert model.x_embedder.weight.is_cuda
    weights = model._trt_state.module.weights
    assert (weights.base_gpu_bytes, weights.base_host_bytes) == (0, sum(p.nbytes for p in matrices(model)))
    expected = dict(real_shaped_model().named_parameters())
    assert all(torch.equal(p.cuda(), expected[name]) for name, p in model.named_parameters())
    on_gpu = fp8(cache_folder, "gpu")
    output_of(on_gpu, arguments)
    assert all(p.is_cuda for p in on_gpu.parameters())


@PLACES
def test_moving_to_the_gpu_and_away(place: str, cache_folder: str) -> None:
    """A model that waits in host memory, as pipelines with model offload keep it."""
    arguments = inputs_of(real_shaped_model())
    expected = output_of(fp8(cache_folder, place), arguments)
    model = compiled_fp8(real_shaped_model().cpu(), Scheme(), cache_folder, base_weights=place)
    for _ in range(2):
        model.to("cuda")
        assert all(p.is_cuda is (place == "gpu") for p in matrices(model))
        assert torch.equal(output_of(model, arguments), expected)
        model.to("cpu")
        assert all(p.device.type == "cpu" for p in model.parameters())


@PLACES
@pytest.mark.parametrize("in_place", [True, False])
def test_a_changed_base_is_quantized_again(in_place: bool, place: str, cache_folder: str) -> None:
    model, plain = fp8(cache_folder, place), real_shaped_model()
    arguments = inputs_of(plain)
    add(model, "a", "to_q")
    add(plain, "a", "to_q")
    output_of(model, arguments)
    for one in (model, plain):
        layer = one.transformer_blocks[0].attn.to_k
        if in_place:
            with torch.no_grad():
                layer.weight.mul_(1.5)
        else:
            layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
    fresh = compiled_fp8(plain, Scheme(), cache_folder, base_weights=place)
    assert torch.equal(output_of(model, arguments), output_of(fresh, arguments))
    assert same(bound(model), bound(fresh))
    bases = zip(matrices(model), matrices(fresh), strict=True)
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in bases), "another base was written over"


@PLACES
def test_eager_blocks_and_the_whole_model_find_their_weights(place: str, cache_folder: str) -> None:
    """diffusers' own blocks need base and adapter on the GPU while they run, and only then."""
    model, plain = fp8(cache_folder, place), real_shaped_model()
    arguments = inputs_of(plain)
    output_of(model, arguments)
    add(model, "a", *TARGETS)
    add(plain, "a", *TARGETS)
    before = output_of(model, arguments)
    handles = [b.register_forward_hook(lambda *_: None)
               for b in (model.transformer_blocks[0], *model.single_transformer_blocks)]  # fmt: skip
    assert relative_l2(output_of(model, arguments), output_of(plain, arguments)) < 0.03
    assert len(model.trt_report().eager_blocks) == 3
    assert all(p.is_cuda is (place == "gpu") for p in matrices(model))
    for handle in handles:
        handle.remove()
    assert torch.equal(output_of(model, arguments), before)
    handle = model.x_embedder.register_forward_hook(lambda *_: None)
    assert relative_l2(output_of(model, arguments), output_of(plain, arguments)) < 0.01
    handle.remove()
    assert torch.equal(output_of(model, arguments), before)


@PLACES
def test_the_way_back(place: str, cache_folder: str) -> None:
    plain = real_shaped_model()
    arguments, expected = inputs_of(plain), output_of(plain, inputs_of(plain))
    model = fp8(cache_folder, place)
    in_fp8 = output_of(model, arguments)
    recipe = detach_recipe(model)
    assert relative_l2(output_of(model, arguments), expected) < 0.02
    attach_recipe(model, recipe)
    assert torch.equal(output_of(model, arguments), in_fp8)
    trt_core.restore_transformer(model)
    assert all(p.is_cuda for p in model.parameters())
    assert torch.equal(output_of(model, arguments), expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_compiling_again_keeps_host_bases_where_they_are(cache_folder: str) -> None:
    model, arguments = fp8(cache_folder, "host"), inputs_of(real_shaped_model())
    before = output_of(model, arguments)
    addresses = [p.data_ptr() for p in matrices(model)]
    trt_core.compile_transformer(model, backend="eager", base_weights="host", cache_folder=cache_folder)
    assert torch.equal(output_of(model, arguments), before)
    assert [p.data_ptr() for p in matrices(model)] == addresses


@PLACES
def test_fuse_and_unfuse(place: str, cache_folder: str) -> None:
    model, arguments = fp8(cache_folder, place), inputs_of(real_shaped_model())
    add(model, "a", *TARGETS)
    with_lora = output_of(model, arguments)
    model.fuse_lora()
    assert relative_l2(output_of(model, arguments), with_lora) < 0.1
    assert model.trt_report().last_refit.merged == 0
    model.unfuse_lora()
    assert relative_l2(output_of(model, arguments), with_lora) < 0.1
