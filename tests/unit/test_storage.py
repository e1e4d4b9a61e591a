"""Matrices of eight bits in memory: how coarse they are, what they multiply to, and what LoRAs add beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trt_core.flux import fp8, storage
from trt_core.flux.branches import Branches
from trt_core.flux.storage import AddedProduct


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(seen: Tensor, expected: Tensor) -> float:
    return float((seen.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("width", "groups"), [(3072, 24), (128, 1), (384, 3), (64, 1), (200, 1)])
def test_a_scale_for_each_128_columns(width: int, groups: int) -> None:
    weight, scale = storage.quantize(normal(6, width))
    assert (weight.dtype, weight.shape, scale.dtype, scale.shape) == (
        torch.int8,
        (6, width),
        torch.float32,
        (6, groups),
    )
    assert weight.float().abs().amax() == 127


def test_every_number_is_within_half_a_step_of_its_group() -> None:
    value = normal(8, 512) * torch.logspace(-3, 3, 4).repeat_interleave(128)
    seen = storage.dequantize(*storage.quantize(value), torch.float32)
    step = value.view(8, 4, 128).abs().amax(-1, keepdim=True) / 127
    assert ((seen - value).view(8, 4, 128).abs() <= step * 0.5001).all()


def test_four_times_finer_than_e4m3() -> None:
    value = normal(64, 3072)
    integers = storage.dequantize(*storage.quantize(value), torch.float32)
    floats = storage.dequantize(*fp8.merge_quantize(value, None, 1.0), torch.float32)
    assert error(floats, value) / error(integers, value) > 3.8


def test_an_outlier_costs_its_group_alone() -> None:
    value = normal(1, 256)
    value[0, 3] = 100.0
    seen = storage.dequantize(*storage.quantize(value), torch.float32)
    assert error(seen[:, 128:], value[:, 128:]) < 0.008
    assert error(seen[:, 4:128], value[:, 4:128]) > 0.1


def test_zeros_and_what_is_not_finite() -> None:
    value = torch.zeros(3, 256)
    value[1, 5], value[2, 200] = torch.nan, torch.inf
    seen = storage.dequantize(*storage.quantize(value), torch.float32)
    assert seen[0].eq(0).all()
    assert seen[1, :128].isnan().all()
    assert seen[1, 128:].eq(0).all()
    assert seen[2, 128:].isnan().all()


def test_written_in_place() -> None:
    out = (torch.zeros(4, 256, dtype=torch.int8), torch.zeros(4, 2))
    seen, fresh = storage.quantize(normal(4, 256), out), storage.quantize(normal(4, 256))
    assert seen[0] is out[0]
    assert all(torch.equal(one, two) for one, two in zip(out, fresh, strict=True))


KINDS = ("int8", "e4m3 per row", "e4m3 per tensor", "plain")


def stored(kind: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    if kind == "int8":
        return storage.quantize(weight)
    return (weight, None) if kind == "plain" else fp8.merge_quantize(weight, None, 1.0, per_row=kind.endswith("row"))


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_lora", [True, False])
def test_linear(batch: int, kind: str, with_bias: bool, with_lora: bool) -> None:
    x = normal(batch, 256, seed=13, dtype=torch.bfloat16)
    bias = normal(24, seed=14, dtype=torch.bfloat16) if with_bias else None
    weight, scale = stored(kind, normal(24, 256, seed=15, dtype=torch.bfloat16))
    added = AddedProduct(normal(24, 4, seed=16, dtype=torch.bfloat16), normal(batch, 4, seed=17)) if with_lora else None
    wide = weight if scale is None else storage.dequantize(weight, scale, torch.float64)
    expected = x.double() @ wide.double().T + (0 if bias is None else bias.double())
    if added is not None:
        expected = expected + added.projected.double() @ added.up.double().T
    seen = storage.linear(x, weight, scale, bias, added)
    assert seen.dtype is torch.bfloat16
    assert error(seen, expected) < 2**-8


def test_branches_are_one_projection_and_a_part_for_each_layer() -> None:
    branches = Branches.empty({"a.lin": (12, 64, 3), "b.lin": (6, 64, 5)}, torch.bfloat16, torch.device("cpu"))
    assert branches.shapes == {"a.lin": (12, 64, 3), "b.lin": (6, 64, 5)}
    branches.down.copy_(normal(8, 64, seed=1))
    for index, branch in enumerate(branches.layers.values()):
        branch.up.copy_(normal(*branch.up.shape, seed=index))
    x = normal(2, 64, seed=9)
    every = branches.added(x)
    for layer, part in (("a.lin", slice(0, 3)), ("b.lin", slice(3, 8))):
        added, delta = every[layer], branches.delta(layer)
        assert delta is not None
        assert error(added.projected, x @ branches.down[part].T) < 1e-6
        assert error(added.projected @ added.up.float().T, x @ delta.T) < 1e-6
    assert "c.lin" not in every
    assert branches.delta("c.lin") is None
