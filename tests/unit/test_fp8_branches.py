"""LoRAs on an FP8 model's modulations: beside the stored matrix where they are low-rank products, else merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.bound_weights import DOUBLE_NAMES, base_weights, copied, differing, low_rank, one, stack, versions
from tests.unit.diffusers_pair import lora
from tests.unit.fp8_bound import LAST, MODULATION, A, C, add, bound, fp8_model, output
from tests.unit.fp8_simulation import round_int8, widened
from trt_core.fp8_weights import Fp8Weights
from trt_core.lora.changes import Change, Difference, LowRank, Patch
from trt_core.quantized_weights import MAX_BRANCH_RANK
from trt_core.weights import WeightPatches

LAYER = MODULATION.removesuffix(".weight")
DOUBLE = DOUBLE_NAMES[3]


def change(rank: int, seed: int = 5, size: float = 0.001) -> LowRank:
    return low_rank(tuple(base_weights()[MODULATION].shape), rank, torch.Generator().manual_seed(seed), size)


def merged_bits(weights: Fp8Weights, value: torch.Tensor) -> bool:
    q, scale = round_int8(value)
    return torch.equal(weights.tensors[MODULATION], q) and torch.equal(weights.tensors[f"{LAYER}.weight_scale"], scale)


def test_a_small_change_arrives_whole_and_no_bit_is_written() -> None:
    """Its size is a hundredth of the step of the stored integers."""
    weights, small = bound(), change(4)
    written, base = versions(weights), widened(weights.tensors[MODULATION], weights.tensors[f"{LAYER}.weight_scale"])
    weights.refit(one(MODULATION, small, 0.5))
    assert versions(weights) == written
    delta = (small.up.float() @ small.down.float()) * small.scale * 0.5
    assert weights.branches is not None
    seen = weights.branches.delta(LAYER)
    assert seen is not None
    assert float((seen - delta).norm() / delta.norm()) < 1e-5
    shown = weights.readable(MODULATION)
    assert shown is not None
    assert torch.equal(shown, (base + seen).bfloat16())
    assert torch.equal(weights.base(MODULATION), base_weights()[MODULATION])


@pytest.mark.parametrize("kind", ["a difference", "too many ranks", "a rank among others"])
def test_what_is_no_small_product_is_merged(kind: str) -> None:
    weights, delta = bound(), change(4, size=0.1).delta("cpu")
    changes: list[Change] = [Difference(delta)]
    if kind == "too many ranks":
        changes = [change(MAX_BRANCH_RANK // 2 + 1, seed=i, size=0.1) for i in range(2)]
    elif kind == "a rank among others":
        changes.append(change(2, size=0.1))
    patches = [one(MODULATION, item)[MODULATION].patches[0] for item in changes]
    weights.refit({MODULATION: WeightPatches(kind, tuple(patches))})
    assert weights.branches is None
    expected = base_weights()[MODULATION].float()
    for item in changes:
        item.apply_(expected, base_weights()[MODULATION], 1.0)
    assert merged_bits(weights, expected)
    # Back beside it: the base's bits, and the bits of weights that never saw the merge.
    weights.refit(one(MODULATION, change(4), mark="small"))
    fresh = bound()
    fresh.refit(one(MODULATION, change(4), mark="small"))
    assert differing(weights, copied(fresh)) == []
    weights.restore()
    assert differing(weights, copied(bound())) == []


def test_the_same_ranks_are_written_in_place() -> None:
    weights = bound()
    weights.refit(stack((C, 1.0)))
    first = weights.branches
    assert first is not None
    addresses = [first.down.data_ptr(), *(branch.up.data_ptr() for branch in first.layers.values())]
    weights.refit(stack((C, 0.25)))
    assert weights.branches is first
    assert weights.branch_bytes == sum(t.nbytes for t in (first.down, *(branch.up for branch in first.layers.values())))
    assert addresses == [first.down.data_ptr(), *(branch.up.data_ptr() for branch in first.layers.values())]
    fresh = bound()
    fresh.refit(stack((C, 0.25)))
    assert differing(weights, copied(fresh)) == []
    weights.refit(stack((A, 1.0)))
    assert weights.branches is not first
    weights.restore()
    assert weights.branches is None
    assert weights.branch_bytes == 0


def test_only_what_changed_is_written() -> None:
    weights, other = (
        bound(),
        one(DOUBLE, low_rank(tuple(base_weights()[DOUBLE].shape), 4, torch.Generator().manual_seed(1))),
    )
    weights.refit({**one(MODULATION, change(4)), **other})
    assert weights.branches is not None
    ups = {name: branch.up for name, branch in weights.branches.layers.items()}
    before = {name: up._version for name, up in ups.items()}
    weights.refit({**one(MODULATION, change(4), 0.5, mark="half"), **other})
    assert [name for name, up in ups.items() if up._version != before[name]] == [LAYER]


def test_two_loras_and_rows_of_one_are_added() -> None:
    rows, width = base_weights()[LAST].shape
    random = torch.Generator().manual_seed(3)
    whole, part = low_rank((rows, width), 3, random), low_rank((8, width), 2, random)
    patches = ((Patch(LAST, None, whole), 0.5), (Patch(LAST, (16, 24), part), -2.0))
    weights = bound()
    weights.refit({LAST: WeightPatches("two", patches)})
    expected = whole.delta("cpu") * (0.5 * whole.scale)
    expected[16:24] += part.delta("cpu") * (-2.0 * part.scale)
    assert weights.branches is not None
    seen = weights.branches.delta(LAST.removesuffix(".weight"))
    assert seen is not None
    assert torch.allclose(seen, expected, rtol=1e-5, atol=1e-6)


def test_a_base_that_changed_under_a_lora_is_stored_anew() -> None:
    weights = bound()
    weights.refit(one(MODULATION, change(4)))
    weights.base(MODULATION).mul_(2.0)
    weights.quantize_again([MODULATION])
    assert merged_bits(weights, base_weights()[MODULATION].float() * 2.0)


def test_graphs_belong_to_the_branches_whose_addresses_they_hold(tmp_path: Path) -> None:
    model: Any = fp8_model(tmp_path)
    add(model, "a", lora("norm.linear"))
    output(model)
    module = model._trt_state.module
    with_a = module.weights.branches
    assert with_a is not None
    assert with_a in module._graphs._owner
    model.set_adapters("a", 0.5)
    output(model)
    assert with_a in module._graphs._owner
    model.disable_adapters()
    output(model)
    assert with_a not in module._graphs._owner
