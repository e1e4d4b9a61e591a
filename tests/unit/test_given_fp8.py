"""FP8 weights as a checkpoint has them: bound bit for bit, LoRAs from what they stand for, the same bits back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import DOUBLE_NAMES, SINGLE_NAMES, base_weights, copied, differing, random_lora, stack
from tests.unit.fp8_simulation import is_modulation
from tests.unit.tiny_flux import shapes_of
from trt_core.config import Backend, BaseWeights, CompileConfig
from trt_core.errors import OutOfMemory, UnsupportedModel
from trt_core.flux import fp8
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import Activations, Fp8Recipe, Granularity, block_linears
from trt_core.given_fp8 import GivenFp8, GivenFp8Weights, given_recipe
from trt_core.lora.changes import Patch, merged
from trt_core.mutable_module import MutableTRTModule
from trt_core.weights import WeightPatches

torch.set_num_threads(1)
CPU = torch.device("cpu")
BASE = base_weights()
ARCH = FluxArchitecture.from_shapes(shapes_of(BASE))
LINEARS = block_linears(ARCH)
A = random_lora("a", DOUBLE_NAMES, 4, seed=1)
B = random_lora("b", (*DOUBLE_NAMES[:2], *SINGLE_NAMES), 8, seed=2)
GRANULARITIES = pytest.mark.parametrize("granularity", list(Granularity))


def recipe(granularity: Granularity = Granularity.TENSOR) -> Fp8Recipe:
    return given_recipe(dict.fromkeys(LINEARS), granularity)


def given(granularity: Granularity = Granularity.TENSOR, left_out: str = "") -> dict[str, Tensor | GivenFp8]:
    """The blocks' weights of a checkpoint. The scales are 1.1 times what a fresh quantization would choose."""
    weights: dict[str, Tensor | GivenFp8] = {}
    for name, tensor in BASE.items():
        layer = name.removesuffix(".weight")
        if layer in LINEARS and layer != left_out:
            rows = granularity is Granularity.ROW
            scale = 1.1 * (fp8.row_scale(tensor) if rows else fp8.tensor_scale(tensor))
            weights[name] = GivenFp8(fp8.quantize_tensor(tensor, scale), scale)
        elif name.startswith(("double", "single")):
            weights[name] = tensor.clone()
    return weights


def bound(granularity: Granularity = Granularity.TENSOR) -> GivenFp8Weights:
    return GivenFp8Weights(given(granularity).items(), recipe(granularity), BaseWeights.AUTO, CPU)


def stands_for(granularity: Granularity) -> dict[str, Tensor]:
    return {
        name: weight.weight.float() * weight.scale if isinstance(weight, GivenFp8) else weight
        for name, weight in given(granularity).items()
    }


@GRANULARITIES
def test_bound_bit_for_bit(granularity: Granularity) -> None:
    weights = bound(granularity)
    for name, weight in given(granularity).items():
        if isinstance(weight, GivenFp8):
            assert torch.equal(weights.tensors[name], weight.weight)
            assert torch.equal(weights.tensors[name.replace("weight", "weight_scale")], weight.scale)
        else:
            assert torch.equal(weights.tensors[name], weight)
    assert weights.dtype == torch.bfloat16


@GRANULARITIES
def test_a_lora_is_merged_into_what_the_weights_stand_for(granularity: Granularity) -> None:
    weights, exact, patches = bound(granularity), stands_for(granularity), stack((A, 0.7))
    weights.refit(patches)
    for name in patches:
        wide = merged(exact[name], patches[name].patches)
        if is_modulation(name):
            assert torch.equal(weights.tensors[name], given(granularity)[name].weight)
            assert torch.allclose(weights.readable(name).float(), wide, rtol=2**-8, atol=1e-5)
            continue
        quantized, scale = fp8.merge_quantize(wide, None, 1.0, per_row=granularity is Granularity.ROW)
        assert torch.equal(weights.tensors[name], quantized)
        assert torch.equal(weights.tensors[name.replace("weight", "weight_scale")], scale)
        assert torch.equal(weights.readable(name), fp8.dequantize(quantized, scale, torch.bfloat16))
        assert torch.equal(weights.base(name), exact[name])


@GRANULARITIES
def test_switching_ends_in_the_given_bits(granularity: Granularity) -> None:
    weights, fresh = bound(granularity), bound(granularity)
    untouched = copied(weights)
    fresh.refit(stack((B, 1.0)))
    for patches in (stack((A, 1.0)), stack((A, 0.5), (B, 1.0)), stack((B, 1.0))):
        weights.refit(patches)
    assert differing(weights, copied(fresh)) == []
    weights.restore()
    assert differing(weights, untouched) == []
    assert weights.base_gpu_bytes == 0


class Failing(Patch):
    """A patch that runs out of memory."""

    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        raise torch.OutOfMemoryError("provoked")


@pytest.mark.parametrize("before", [{}, stack((A, 1.0))])
def test_a_failed_refit_puts_everything_back(before: Mapping[str, WeightPatches]) -> None:
    weights = bound()
    weights.refit(before)
    kept = copied(weights)
    last = SINGLE_NAMES[2]
    failing = Failing(last, None, next(iter(A.patches.values()))[0].change)
    with pytest.raises(OutOfMemory):
        weights.refit(stack((B, 1.0)) | {last: WeightPatches("failing", ((failing, 1.0),))})
    assert differing(weights, kept) == []
    weights.restore()
    assert differing(weights, copied(bound())) == []


def test_an_input_scale_per_layer_makes_a_static_recipe() -> None:
    scales = {name: torch.tensor(0.1 + index / 7).item() for index, name in enumerate(LINEARS)}  # fp32, as in a file
    found = given_recipe(scales, Granularity.TENSOR)
    assert found.config.activations is Activations.STATIC
    assert all(found.input_scale(name) == scales[name] for name in found.activation_linears)
    weights = GivenFp8Weights(given().items(), found, BaseWeights.AUTO, CPU)
    name = "single_blocks.0.linear1"
    assert weights.tensors[f"{name}.input_scale"].item() == scales[name]


def test_a_missing_input_scale_makes_it_dynamic() -> None:
    scales = dict.fromkeys(LINEARS, 0.5) | {"single_blocks.0.linear1": None}
    assert given_recipe(scales, Granularity.TENSOR).config.activations is Activations.DYNAMIC


def test_a_layer_that_is_not_in_fp8_is_an_error() -> None:
    with pytest.raises(UnsupportedModel, match=r"single_blocks\.0\.linear1\.weight"):
        GivenFp8Weights(given(left_out="single_blocks.0.linear1").items(), recipe(), BaseWeights.AUTO, CPU)


def test_a_module_with_a_layer_in_full_precision() -> None:
    """Files often leave some layers out; the module runs both kinds."""
    left_out = "double_blocks.0.img_attn.qkv"
    module = MutableTRTModule(ARCH, CompileConfig(Backend.EAGER))
    layers = given_recipe(dict.fromkeys(name for name in LINEARS if name != left_out), Granularity.TENSOR)
    module.load_given_blocks(given(left_out=left_out).items(), CPU, layers)
    assert module.weights.readable(f"{left_out}.weight").dtype == torch.bfloat16
    assert module.runner(1, 16, 8) is not None


def test_a_missing_weight_is_an_error() -> None:
    weights = given()
    del weights["double_blocks.1.img_mlp.0.bias"]
    with pytest.raises(UnsupportedModel, match=r"double_blocks\.1\.img_mlp\.0\.bias"):
        MutableTRTModule(ARCH, CompileConfig(Backend.EAGER)).load_given_blocks(weights.items(), CPU, recipe())
