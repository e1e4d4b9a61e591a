"""Every kind of change against dense arithmetic, and DoRA, LoHa and LoKr against PEFT itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.unit.lora_files import factors, random_tensor
from trt_core.lora import (
    Change,
    Difference,
    Dora,
    DoraRule,
    Hadamard,
    Kronecker,
    LowRank,
    Patch,
    Replacement,
    SwappedHalves,
    merged,
)

OUT, IN, RANK = 24, 16, 4
BASE = random_tensor(OUT, IN, seed=1)


def low_rank(seed: int = 2, scale: float = 0.75, rank: int = RANK) -> LowRank:
    return LowRank(*factors((OUT, IN), rank, seed), scale)


def every_kind() -> list[Change]:
    w1_b, w1_a = factors((OUT, IN), RANK, 20)
    w2_b, w2_a = factors((OUT, IN), RANK, 21)
    return [
        low_rank(),
        Hadamard(w1_a, w1_b, w2_a, w2_b, 0.5),
        Kronecker((random_tensor(6, 4, seed=22),), (random_tensor(4, 4, seed=23),)),
        Difference(random_tensor(OUT, IN, seed=24)),
        Replacement(random_tensor(OUT, IN, seed=25)),
        Dora(low_rank(), random_tensor(OUT, seed=26), DoraRule.PEFT),
        Dora(low_rank(), random_tensor(OUT, 1, seed=26), DoraRule.COMFYUI),
        Dora(low_rank(), random_tensor(1, IN, seed=27), DoraRule.COMFYUI),
        SwappedHalves(low_rank()),
    ]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


class OneLinear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("strength", [1.0, 0.3, -1.7, 2.0])
def test_low_rank_is_the_scaled_product_of_its_factors(strength: float) -> None:
    down, up = factors((OUT, IN), RANK, 2)
    expected = (BASE.double() + strength * 0.75 * (up.double() @ down.double())).float()
    torch.testing.assert_close(merged(BASE, [(LowRank(down, up, 0.75), strength)]), expected)


def test_low_rank_sums_in_the_order_of_comfyui_bit_for_bit() -> None:
    first, second = low_rank(2, 3.3 / 4), low_rank(3, 0.1, rank=7)
    expected = BASE.clone()
    expected += (0.7 * (3.3 / 4)) * torch.mm(first.up, first.down)
    expected += (-0.4 * 0.1) * torch.mm(second.up, second.down)
    assert torch.equal(merged(BASE, [(first, 0.7), (second, -0.4)]), expected)


def test_merged_computes_in_fp32_and_only_reads_the_base_and_the_factors() -> None:
    base = BASE.bfloat16()
    change = low_rank()
    half = LowRank(change.down.half(), change.up.half(), change.scale)
    before = [tensor.clone() for tensor in (base, half.down, half.up)]
    result = merged(base, [(half, 1.0)])
    assert result.dtype == torch.float32
    expected = base.double() + 0.75 * half.up.double() @ half.down.double()
    torch.testing.assert_close(result, expected.float())
    assert all(torch.equal(old, new) for old, new in zip(before, (base, half.down, half.up), strict=True))


def test_a_full_difference_is_never_scaled_in_place() -> None:
    diff = random_tensor(OUT, IN, seed=5)
    before = diff.clone()
    torch.testing.assert_close(merged(BASE, [(Difference(diff), -0.5)]), BASE - 0.5 * diff)
    assert torch.equal(diff, before)


@pytest.mark.parametrize("change", every_kind(), ids=lambda change: type(change).__name__)
def test_strength_zero_changes_no_bit(change: Change) -> None:
    base = BASE.clone()
    base[0] = -0.0
    assert torch.equal(bits(merged(base, [(change, 0.0)])), bits(base))


@pytest.mark.parametrize("change", every_kind(), ids=lambda change: type(change).__name__)
def test_every_kind_changes_the_weight_at_strength_one(change: Change) -> None:
    assert (merged(BASE, [(change, 1.0)]) - BASE).norm() > 0.1 * BASE.norm()


def test_strength_one_and_minus_one_are_opposite() -> None:
    torch.testing.assert_close(merged(BASE, [(low_rank(), 1.0), (low_rank(), -1.0)]), BASE)


def test_loha_equals_peft() -> None:
    model = get_peft_model(OneLinear(BASE), LoHaConfig(r=RANK, alpha=6, target_modules=["linear"], init_weights=False))
    layer = model.base_model.model.linear
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    change = Hadamard(*(getattr(layer, name)["default"].detach() for name in names), scale=6 / RANK)
    expected = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(merged(torch.zeros_like(BASE), [(change, 1.0)]), expected)


@pytest.mark.parametrize(("rank", "decompose_both"), [(1, False), (1, True), (8, False)])
def test_lokr_equals_peft(rank: int, decompose_both: bool) -> None:
    config = LoKrConfig(r=rank, alpha=3, target_modules=["linear"], init_weights=False, decompose_both=decompose_both)
    layer = get_peft_model(OneLinear(BASE), config).base_model.model.linear

    def side(name: str) -> tuple[Tensor, ...]:
        full = getattr(layer, name)
        stored = (full,) if "default" in full else (getattr(layer, f"{name}_a"), getattr(layer, f"{name}_b"))
        return tuple(factor["default"].detach() for factor in stored)

    sides = side("lokr_w1"), side("lokr_w2")
    assert [len(factors) for factors in sides] == [1 + decompose_both, 1 + (rank == 1)]
    expected = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(merged(torch.zeros_like(BASE), [(Kronecker(*sides, 3 / rank), 1.0)]), expected)


def dora_layer(alphas: dict[str, float]) -> nn.Module:
    model = None
    for seed, (adapter, alpha) in enumerate(alphas.items()):
        config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["linear"], use_dora=True, init_lora_weights=False)
        if model is None:
            model = get_peft_model(OneLinear(BASE), config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
        layer = model.base_model.model.linear
        layer.lora_magnitude_vector[adapter].weight.data.copy_(random_tensor(OUT, seed=40 + seed).abs() + 0.5)
        down, up = factors((OUT, IN), RANK, 50 + seed)
        layer.lora_A[adapter].weight.data.copy_(down)
        layer.lora_B[adapter].weight.data.copy_(up)
    assert model is not None
    model.base_model.set_adapter(list(alphas))
    return model.base_model.model.linear


def dora_of(layer: nn.Module, adapter: str) -> Dora:
    inner = LowRank(
        layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach(), layer.scaling[adapter]
    )
    return Dora(inner, layer.lora_magnitude_vector[adapter].weight.detach(), DoraRule.PEFT)


def test_dora_equals_pefts_merge() -> None:
    layer = dora_layer({"first": 6})
    change = dora_of(layer, "first")
    assert change.inner.scale == 1.5
    layer.merge()
    torch.testing.assert_close(merged(BASE, [(change, 1.0)]), layer.base_layer.weight.detach())


def test_two_doras_equal_pefts_forward() -> None:
    layer = dora_layer({"first": 6, "second": 2})
    expected = layer(torch.eye(IN)).T.detach()
    changes = [(dora_of(layer, "first"), 1.0), (dora_of(layer, "second"), 1.0)]
    torch.testing.assert_close(merged(BASE, changes), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", every_kind()[5:8], ids=["peft", "comfyui rows", "comfyui columns"])
@pytest.mark.parametrize("strength", [0.25, -1.0, 1.5])
def test_dora_strength_scales_the_difference_from_the_base(change: Change, strength: float) -> None:
    full = merged(BASE, [(change, 1.0)])
    torch.testing.assert_close(merged(BASE, [(change, strength)]), BASE + strength * (full - BASE))


def test_dora_of_comfyui_divides_rows_by_the_norm_of_the_weight_without_the_delta() -> None:
    inner, magnitude = low_rank(), random_tensor(OUT, 1, seed=30)
    total = BASE + 0.75 * inner.up @ inner.down
    expected = total * magnitude / BASE.pow(2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(merged(BASE, [(Dora(inner, magnitude, DoraRule.COMFYUI), 1.0)]), expected)


def test_dora_of_comfyui_divides_columns_by_the_norm_of_the_weight_with_the_delta() -> None:
    inner, magnitude = low_rank(), random_tensor(1, IN, seed=31)
    total = BASE + 0.75 * inner.up @ inner.down
    expected = total * magnitude / total.pow(2).sum(0, keepdim=True).sqrt()
    torch.testing.assert_close(merged(BASE, [(Dora(inner, magnitude, DoraRule.COMFYUI), 1.0)]), expected)


def test_dora_on_rows_of_zeros_is_zero_and_not_nan() -> None:
    base = BASE.clone()
    base[3] = 0
    inner = low_rank()
    inner.up[3] = 0
    for magnitude, rule in (
        (torch.full((OUT,), 9.0), DoraRule.PEFT),
        (torch.full((OUT, 1), 9.0), DoraRule.COMFYUI),
    ):
        result = merged(base, [(Dora(inner, magnitude, rule), 1.0)])
        assert torch.equal(result[3], torch.zeros(IN))


def test_dora_after_a_lora_takes_its_norm_from_the_base_in_peft_and_from_the_sum_in_comfyui() -> None:
    lora, inner = low_rank(60), low_rank(61)
    magnitude = random_tensor(OUT, 1, seed=62)
    with_lora = BASE + 0.75 * lora.up @ lora.down
    delta = 0.75 * inner.up @ inner.down
    norms = {DoraRule.PEFT: (BASE + delta).norm(dim=1), DoraRule.COMFYUI: with_lora.norm(dim=1)}
    for rule, norm in norms.items():
        result = merged(BASE, [(lora, 1.0), (Dora(inner, magnitude, rule), 1.0)])
        torch.testing.assert_close(result, (with_lora + delta) * magnitude / norm[:, None])


def test_replacement_stores_the_values_own_bits() -> None:
    value = random_tensor(OUT, IN, seed=8) * 1e-6
    assert torch.equal(bits(merged(BASE, [(Replacement(value), 1.0)])), bits(value))
    torch.testing.assert_close(merged(BASE, [(Replacement(value), 0.25)]), 0.75 * BASE + 0.25 * value)


def test_swapped_halves_writes_the_upper_rows_below() -> None:
    change = low_rank()
    delta = 0.75 * change.up @ change.down
    expected = BASE + torch.cat([delta[OUT // 2 :], delta[: OUT // 2]])
    torch.testing.assert_close(merged(BASE, [(SwappedHalves(change), 1.0)]), expected)


def test_swapped_halves_takes_the_norms_of_dora_from_the_rows_it_writes() -> None:
    change = Dora(low_rank(), random_tensor(OUT, seed=26), DoraRule.PEFT)
    swapped_base = torch.cat([BASE[OUT // 2 :], BASE[: OUT // 2]])
    in_its_own_order = merged(swapped_base, [(change, 1.0)])
    expected = torch.cat([in_its_own_order[OUT // 2 :], in_its_own_order[: OUT // 2]])
    torch.testing.assert_close(merged(BASE, [(SwappedHalves(change), 1.0)]), expected)


@pytest.mark.parametrize("rows", [(0, 8), (8, 16), (16, 24)])
def test_a_patch_changes_its_rows_and_no_bit_of_the_others(rows: tuple[int, int]) -> None:
    down, up = factors((8, IN), RANK, 9)
    result = merged(BASE, [(Patch("w", rows, LowRank(down, up)), 1.0)])
    expected = BASE.clone()
    expected[rows[0] : rows[1]] += up @ down
    torch.testing.assert_close(result, expected)
    others = torch.ones(OUT, dtype=torch.bool)
    others[rows[0] : rows[1]] = False
    assert torch.equal(bits(result[others]), bits(BASE[others]))


def test_a_dora_patch_takes_its_base_from_its_own_rows() -> None:
    down, up = factors((8, IN), RANK, 9)
    change = Dora(LowRank(down, up), random_tensor(8, seed=10), DoraRule.PEFT)
    result = merged(BASE, [(Patch("w", (8, 16), change), 0.5)])
    torch.testing.assert_close(result[8:16], merged(BASE[8:16], [(change, 0.5)]))


def test_a_change_on_a_bias() -> None:
    bias, diff = random_tensor(OUT, seed=11), random_tensor(8, seed=12)
    result = merged(bias, [(Patch("b", (8, 16), Difference(diff, 0.5)), 2.0)])
    torch.testing.assert_close(result, torch.cat([bias[:8], bias[8:16] + diff, bias[16:]]))


@pytest.mark.parametrize("change", every_kind(), ids=lambda change: type(change).__name__)
def test_to_copies_nothing_that_is_there_already(change: Change) -> None:
    moved = Patch("w", (0, OUT), change).to("cpu").change
    assert type(moved) is type(change)
    assert [tensor.data_ptr() for tensor in tensors_of(moved)] == [tensor.data_ptr() for tensor in tensors_of(change)]


@pytest.mark.parametrize("change", every_kind(), ids=lambda change: type(change).__name__)
def test_to_moves_every_tensor_in_its_own_dtype(change: Change) -> None:
    moved = tensors_of(change.to("meta"))
    assert moved
    assert all(tensor.is_meta for tensor in moved)
    assert [tensor.dtype for tensor in moved] == [tensor.dtype for tensor in tensors_of(change)]


def test_ranks() -> None:
    ranks = [change.rank for change in every_kind()]
    assert ranks == [RANK, RANK, None, None, None, RANK, RANK, RANK, RANK]
    assert Kronecker(factors((6, 4), 3, 1)[::-1], (torch.ones(4, 4),)).rank == 3


def tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    if isinstance(value, Change):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_of(getattr(value, name))]
    return []
