"""A real-shaped FLUX in FP8 with bases on the GPU or in host memory, from binding to the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trt_core
from tests.unit.fp8_simulation import (
    Scheme,
    compiled_fp8,
)
from trt_core.backends.check import relative_l2
from trt_core.fp8_recipe import attach_recipe, detach_recipe

from .conftest import inputs_of, output_of, real_shaped_model
from .fp8_models import PLACES, TARGETS, add, bound, fp8, matrices, same

pytestmark = pytest.mark.usefixtures("needs_fp8_gpu")


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
