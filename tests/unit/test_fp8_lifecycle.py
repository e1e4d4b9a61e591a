"""An FP8 model stays diffusers' own: its parameters, its methods, what runs eagerly, the way back, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from tests.unit.diffusers_pair import lora
from tests.unit.fp8_simulation import Scheme, compiled_fp8, fused_layers, simulation, three_ways
from tests.unit.tiny_flux import FP32_BOUND, call_inputs, run_diffusers, tiny_transformer
from trt_core import compile_transformer, restore_transformer
from trt_core.backends.check import relative_l2
from trt_core.diffusers_binding import find_slots
from trt_core.errors import InvalidOption, MissingDependency, UnsupportedGPU, UnsupportedModel
from trt_core.fp8_model import adapters_of, require_fp8
from trt_core.fp8_recipe import Fp8Config, attach_recipe, attached_recipe, detach_recipe
from trt_core.quantize import dequantize_, flux_architecture, quantize_fp8_

RATIO_BOUND = 1.2
EQUAL = 2e-4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = {"heads": 4, "head_dim": 64}


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_transformer()


# -- the recipe comes and goes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["quantize", "compile"])
def test_before_and_after_compiling(first: str, model: Any, tmp_path: Path) -> None:
    ours = copy.deepcopy(model)
    options = {"backend": "eager", "cache_folder": str(tmp_path)}
    if first == "quantize":
        quantize_fp8_(ours)
        compile_transformer(ours, **options)
    else:
        compile_transformer(ours, **options)
        run_diffusers(ours, call_inputs(ours))
        quantize_fp8_(ours)
        assert type(ours) is FluxTransformer2DModel, "it says that it has to be compiled again"
        compile_transformer(ours, **options)
    found = three_ways(ours, model, Scheme(), call_inputs(model))
    assert relative_l2(found.ours, found.simulated) <= EQUAL


def test_a_recipe_that_is_taken_off_and_put_on_a_compiled_model(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), call_inputs(model)
    in_fp8, plain = run_diffusers(ours, inputs), run_diffusers(model, inputs)
    recipe = detach_recipe(ours)
    assert relative_l2(run_diffusers(ours, inputs), plain) <= FP32_BOUND
    attach_recipe(ours, recipe)
    assert torch.equal(run_diffusers(ours, inputs), in_fp8)
    attach_recipe(ours, Scheme(per_row=False).recipe(ours))
    expected = run_diffusers(simulation(model, Scheme(per_row=False)), inputs)
    assert relative_l2(run_diffusers(ours, inputs), expected) <= EQUAL
    assert not torch.equal(run_diffusers(ours, inputs), in_fp8)


def test_dequantize_gives_the_model_back(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), call_inputs(model)
    run_diffusers(ours, inputs)
    dequantize_(ours)
    assert type(ours) is FluxTransformer2DModel
    assert attached_recipe(ours) is None
    assert torch.equal(run_diffusers(ours, inputs), run_diffusers(model, inputs))
    assert same(ours, model)


def test_restore_keeps_the_recipe_for_the_next_compilation(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), call_inputs(model)
    in_fp8 = run_diffusers(ours, inputs)
    restore_transformer(ours)
    assert torch.equal(run_diffusers(ours, inputs), run_diffusers(model, inputs))
    compile_transformer(ours, backend="eager", cache_folder=str(tmp_path))
    assert torch.equal(run_diffusers(ours, inputs), in_fp8)


# -- parameters are the base -------------------------------------------------------------------------------------------


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return list(mine) == list(other) and all(torch.equal(mine[n], other[n]) for n in other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_show_the_base_in_the_models_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = tiny_transformer().to(dtype)
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), tmp_path)
    run_diffusers(ours, call_inputs(ours))
    bases = dict(plain.named_parameters())
    assert all(torch.equal(p, bases[n]) and p.dtype is dtype for n, p in ours.named_parameters())
    assert (ours.dtype, ours.num_parameters()) == (dtype, plain.num_parameters())
    assert same(ours, plain)
    ours.save_pretrained(tmp_path / "saved")
    read = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    assert same(read, plain)
    assert attached_recipe(read) is None


def test_bound_weights_take_half_of_bf16(tmp_path: Path) -> None:
    """And the base is the parameter itself, not a third copy."""
    ours = compiled_fp8(tiny_transformer().bfloat16(), Scheme(), tmp_path)
    run_diffusers(ours, call_inputs(ours))
    weights = ours._trt_state.module.weights
    matrices = [f"{n}.weight" for n in fused_layers(ours)]
    assert all(weights.tensors[n].dtype in (torch.float8_e4m3fn, torch.int8) for n in matrices)
    first = fused_layers(ours)["double_blocks.0.img_attn.qkv"][0].weight
    assert weights.base("double_blocks.0.img_attn.qkv.weight").data_ptr() == first.data_ptr()


def _reassign(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5 + 0.02)


def _in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(1.5).add_(0.02)


@pytest.mark.parametrize("adapter", [None, lora("to_k"), lora("to_q"), lora("proj_out")],
                         ids=["none", "on it", "beside", "far"])  # fmt: skip
@pytest.mark.parametrize("change", [_reassign, _in_place])
@pytest.mark.parametrize("place", ["transformer_blocks.1.attn.to_k", "transformer_blocks.0.norm1.linear",
                                   "x_embedder", "single_transformer_blocks.1.norm.linear"])  # fmt: skip
def test_a_changed_base_is_quantized_again(place: str, change: Any, adapter: Any, model: Any, tmp_path: Path) -> None:
    models = [compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), model]
    if adapter is not None:
        for one in models:
            torch.manual_seed(3)
            one.add_adapter(copy.deepcopy(adapter), adapter_name="a")
    ours, inputs = models[0], call_inputs(model)
    before = run_diffusers(ours, inputs)
    for one in models:
        layer = one.get_submodule(place)
        change(getattr(layer, "base_layer", layer))
    fresh = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path)
    seen = run_diffusers(ours, inputs)
    assert torch.equal(seen, run_diffusers(fresh, inputs))
    assert relative_l2(seen, before) > 1e-3
    assert torch.equal(run_diffusers(ours, inputs), seen)


def test_a_loaded_state_is_quantized_again(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(model, Scheme(), tmp_path), call_inputs(model)
    run_diffusers(ours, inputs)
    other = tiny_transformer(seed=3)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(run_diffusers(ours, inputs), run_diffusers(compiled_fp8(other, Scheme(), tmp_path), inputs))


def test_exchanged_blocks_are_noticed(model: Any, tmp_path: Path) -> None:
    ours = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path)
    run_diffusers(ours, call_inputs(model))
    for one in (ours, model):
        first, second = one.transformer_blocks
        one.transformer_blocks[0], one.transformer_blocks[1] = second, first
    found = three_ways(ours, model, Scheme(), call_inputs(model))
    assert relative_l2(found.ours, found.simulated) <= EQUAL


def test_another_dtype_quantizes_and_compiles_anew(tmp_path: Path) -> None:
    plain = tiny_transformer(**WIDE)
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), tmp_path)
    run_diffusers(ours, call_inputs(ours))
    ours.to(torch.bfloat16)
    plain.to(torch.bfloat16)
    found = three_ways(ours, plain, Scheme(), call_inputs(plain))
    assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * relative_l2(found.simulated, found.exact)
    assert ours.trt_report().builds == 2
    assert same(ours, plain)


def test_moving_to_where_it_is_changes_nothing(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(model, Scheme(), tmp_path), call_inputs(model)
    before = run_diffusers(ours, inputs)
    ours.to("cpu").eval()
    assert torch.equal(run_diffusers(ours, inputs), before)
    assert ours.trt_report().builds == 1


def test_a_deep_copy_is_quantized_by_itself(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(model, Scheme(), tmp_path), call_inputs(model)
    before = run_diffusers(ours, inputs)
    copied = copy.deepcopy(ours)
    assert torch.equal(run_diffusers(copied, inputs), before)
    with torch.no_grad():
        copied.transformer_blocks[0].ff.net[2].weight.zero_()
    assert not torch.equal(run_diffusers(copied, inputs), before)
    assert torch.equal(run_diffusers(ours, inputs), before)


# -- what runs as diffusers runs it ------------------------------------------------------------------------------------


def _half(module: nn.Module, args: Any, output: Any) -> Any:
    return tuple(part * 0.5 for part in output) if isinstance(output, tuple) else output * 0.5


@pytest.mark.parametrize("adapter", [None, lora("to_q", "proj_mlp", "norm.linear")], ids=["", "under a LoRA"])
@pytest.mark.parametrize("place", ["transformer_blocks.0", "single_transformer_blocks.1"])
def test_a_hooked_block_runs_in_the_models_dtype(place: str, adapter: Any, model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), call_inputs(model)
    if adapter is not None:
        for one in (ours, model):
            torch.manual_seed(3)
            one.add_adapter(copy.deepcopy(adapter), adapter_name="a")
    before = run_diffusers(ours, inputs)
    handle = ours.get_submodule(place).register_forward_hook(_half)
    seen = run_diffusers(ours, inputs)
    merged = copy.deepcopy(model)
    if adapter is not None:
        merged.fuse_lora()
    name = "double_blocks.0." if place == "transformer_blocks.0" else "single_blocks.1."
    scheme = Scheme(excluded=frozenset(n for n in fused_layers(model) if n.startswith(name)))
    expected = simulation(merged, scheme, model)
    expected.get_submodule(place).register_forward_hook(_half)
    assert relative_l2(seen, run_diffusers(expected, inputs)) <= 20 * EQUAL
    assert list(ours.trt_report().eager_blocks) == [name[:-1]]
    handle.remove()
    assert torch.equal(run_diffusers(ours, inputs), before)


def test_the_whole_model_may_run_eagerly_for_a_while(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), call_inputs(model)
    in_fp8 = run_diffusers(ours, inputs)
    handle = ours.x_embedder.register_forward_hook(lambda *_: None)
    assert torch.equal(run_diffusers(ours, inputs), run_diffusers(model, inputs))
    assert list(ours.trt_report().eager_blocks) == ["the whole model"]
    handle.remove()
    assert torch.equal(run_diffusers(ours, inputs), in_fp8)


def test_training_uses_the_base(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), call_inputs(model)
    in_fp8 = run_diffusers(ours, inputs)
    ours.train()
    ours(**inputs, return_dict=False)[0].square().mean().backward()
    assert ours.transformer_blocks[0].attn.to_q.weight.grad.abs().sum() > 0
    ours.eval()
    assert torch.equal(run_diffusers(ours, inputs), in_fp8)


# -- where FP8 cannot run ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_cannot_is_refused_with_advice() -> None:
    with pytest.raises(UnsupportedGPU, match=r"FP8 cannot run here: .*Run in bf16: call dequantize_\(model\)"):
        require_fp8(torch.device("cuda"))


def test_tensorrt_without_a_gpu_is_refused_and_another_backend_works(model: Any, tmp_path: Path) -> None:
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path, backend="tensorrt"), call_inputs(model)
    with pytest.raises(MissingDependency, match='backend="tensorrt" cannot be used here'):
        run_diffusers(ours, inputs)
    compile_transformer(ours, backend="eager", cache_folder=str(tmp_path))
    found = three_ways(ours, model, Scheme(), inputs)
    assert relative_l2(found.ours, found.simulated) <= EQUAL


def test_a_model_that_could_not_be_bound_can_be_repaired_or_dequantized(model: Any, tmp_path: Path) -> None:
    """A failure of the first call must leave nothing half bound that the advice in its message then stumbles over."""
    ours, inputs = compiled_fp8(copy.deepcopy(model), Scheme(), tmp_path), call_inputs(model)
    ours.proj_out.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match=r"dtypes torch\.bfloat16, torch\.float32"):
            run_diffusers(ours, inputs)
    ours.proj_out.to(torch.float32)
    ours.proj_out.load_state_dict(model.proj_out.state_dict())
    found = three_ways(ours, model, Scheme(), inputs)
    assert relative_l2(found.ours, found.simulated) <= EQUAL
    ours.proj_out.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel):
        run_diffusers(ours, inputs)
    dequantize_(ours)
    ours.proj_out.to(torch.float32)
    ours.proj_out.load_state_dict(model.proj_out.state_dict())
    assert torch.equal(run_diffusers(ours, inputs), run_diffusers(model, inputs))


def test_a_recipe_of_another_model_is_refused(model: Any, tmp_path: Path) -> None:
    recipe = Scheme().recipe(tiny_transformer(double=3))
    with pytest.raises(InvalidOption, match="recipe is of another model"):
        quantize_fp8_(model, recipe=recipe)
    with pytest.raises(InvalidOption, match="matches no layer"):
        quantize_fp8_(model, Fp8Config(exclude=("single_blocks.7.*",)))
    assert attached_recipe(model) is None
    assert flux_architecture(model).double_depth == 2


def test_adapters_go_to_what_they_change() -> None:
    """With bases in host memory matrices lie there and biases on the GPU: an adapter must not follow the other one."""
    model: Any = tiny_transformer()
    model.add_adapter(lora("to_q", "proj_out", lora_bias=True), adapter_name="a")
    slots = [slot for slot in find_slots(model, flux_architecture(model)) if hasattr(slot.module(), "lora_A")]
    kinds = {"weight": {"lora_A.a.weight", "lora_B.a.weight"}, "bias": {"lora_B.a.bias"}}
    for slot in slots:
        names = {id(parameter): name for name, parameter in slot.module().named_parameters()}
        assert {names[id(adapter)] for adapter in adapters_of(slot)} == kinds[slot.kind]
    assert len(slots) == 2 * 7, "to_q of four blocks, proj_out of two of them and of the model"
