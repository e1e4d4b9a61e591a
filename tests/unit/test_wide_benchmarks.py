"""The reference in fp32 is exact, reads LoRAs as they are, and weights are the same wherever they lie."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import fp8_lines, fp8_quality, model
from benchmarks.fake_quant import fake_quantized
from benchmarks.fp8_calls import call, exact
from benchmarks.wide import widened

CPU = torch.device("cpu")


@pytest.fixture
def small() -> Any:
    return model.full_size_transformer(CPU, fp8_quality.BRANCH_GAIN, **fp8_lines.TINY)


def call_of(transformer: Any) -> dict[str, Tensor]:
    return model.inputs(transformer, 1, 64, 64, 8)


def wide_copy(transformer: Any) -> Any:
    return copy.deepcopy(transformer).float()


def test_the_reference_is_the_model_in_fp32_bit_for_bit(small: Any) -> None:
    wide = widened(small)
    assert sum(p.numel() for p in wide.parameters()) < 1000, "it keeps no matrix"
    for adversarial in (False, True):
        model.fill(small, adversarial, fp8_quality.BRANCH_GAIN)
        arguments = exact(call_of(small))
        truth = call(wide_copy(small), arguments)
        assert truth.dtype is torch.float32
        assert torch.equal(call(wide, arguments), truth)


def test_the_reference_merges_in_fp32_what_diffusers_fuses(small: Any) -> None:
    """At the strength of now, one adapter or two; nothing where they are disabled."""
    wide, plain = widened(small), wide_copy(small)
    arguments = exact(call_of(small))
    model.add_loras(small, 4, ("a", "b"), 0.05)
    for names, strengths in ((["a"], [-0.5]), (["a", "b"], [1.0, 2.0])):
        small.set_adapters(names, strengths)
        theirs = wide_copy(small)
        theirs.fuse_lora()
        layer = theirs.transformer_blocks[0].attn.to_q
        assert torch.allclose(wide.transformer_blocks[0].attn.to_q.weight, layer.base_layer.weight, atol=1e-6)
        fused, base = call(theirs, arguments), call(plain, arguments)
        assert float((call(wide, arguments) - fused).norm()) < 1e-4 * float((fused - base).norm())
    small.disable_adapters()
    assert torch.equal(call(wide, arguments), call(plain, arguments))


def test_the_simulation_rounds_the_reference(small: Any) -> None:
    wide, plain, arguments = widened(small), wide_copy(small), exact(call_of(small))
    with fake_quantized(wide), fake_quantized(plain):
        rounded = call(wide, arguments)
        assert torch.equal(rounded, call(plain, arguments))
    assert not torch.equal(call(wide, arguments), rounded)


def test_weights_in_other_memory_are_filled_where_the_model_computes(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device plays the host, whose own random numbers would be others."""
    before = {name: parameter.clone() for name, parameter in small.named_parameters()}
    layer, copied = small.transformer_blocks[0].attn.to_q, []
    layer.weight = there = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    monkeypatch.setattr(Tensor, "copy_", lambda self, values: copied.append(values.device))
    model.fill(small, False, fp8_quality.BRANCH_GAIN)
    assert copied == [CPU]
    others = {name: parameter for name, parameter in small.named_parameters() if parameter is not there}
    assert all(torch.equal(parameter, before[name]) for name, parameter in others.items())
