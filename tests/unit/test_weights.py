"""Refit is exact: it depends on the new LoRAs alone, touches only their layers, and drifts by nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch

from tests.unit.bound_weights import (
    DOUBLE_NAMES,
    SINGLE_NAMES,
    base_weights,
    bound,
    copied,
    differing,
    low_rank,
    one,
    random_lora,
    stack,
    versions,
)
from trt_core.config import BaseWeights
from trt_core.errors import OutOfMemory
from trt_core.lora.changes import Difference, LowRank, Patch, Replacement, merged
from trt_core.row_merge import add_rows, disjoint
from trt_core.weights import BoundWeights, WeightPatches, plan_refit

A = random_lora("a", DOUBLE_NAMES, 4, seed=1)
B = random_lora("b", (*DOUBLE_NAMES[2:], *SINGLE_NAMES[:1]), 32, seed=2)
C = random_lora("c", SINGLE_NAMES[1:], 7, seed=3)
QKV = "double_blocks.0.img_attn.qkv.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def fresh(new: Mapping[str, WeightPatches], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The weights after one refit of a model that never had another LoRA."""
    weights = bound(dtype)
    weights.refit(new)
    return copied(weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_to_b_is_a_fresh_b(dtype: torch.dtype) -> None:
    weights = bound(dtype)
    weights.refit(stack((A, 1.0)))
    weights.refit(stack((B, 0.7)))
    assert differing(weights, fresh(stack((B, 0.7)), dtype)) == []
    assert len(differing(weights, base_weights(dtype))) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_to_none_is_the_base(dtype: torch.dtype) -> None:
    weights = bound(dtype)
    weights.refit(stack((A, 1.0), (C, -2.0)))
    assert len(differing(weights, base_weights(dtype))) == 6
    weights.restore()
    assert differing(weights, base_weights(dtype)) == []
    assert weights.touched == frozenset()


def test_fifty_random_switches_drift_by_nothing() -> None:
    choices, weights = random.Random(5), bound()
    strengths = (1.0, 0.35, -0.8, 0.0, 2.5)
    for _ in range(50):
        loras = choices.sample((A, B, C), choices.randint(0, 3))
        new = stack(*((lora, choices.choice(strengths)) for lora in loras))
        weights.refit(new)
        assert differing(weights, fresh(new)) == []
        assert weights.touched == new.keys()
    weights.restore()
    assert differing(weights, base_weights()) == []


def test_strength_zero_is_the_base() -> None:
    weights = bound()
    weights.refit(stack((A, 0.0), (B, 0.0)))
    assert differing(weights, base_weights()) == []
    assert weights.touched == A.patches.keys() | B.patches.keys()


def test_opposite_strengths_differ_by_sign() -> None:
    plus, minus, base = (
        fresh(stack((C, 0.5)), torch.float32),
        fresh(stack((C, -0.5)), torch.float32),
        bound(torch.float32),
    )
    for name in C.patches:
        up, down = plus[name] - base.tensors[name], base.tensors[name] - minus[name]
        assert torch.allclose(up, down, atol=1e-6)
        assert up.abs().max() > 0.01


def test_a_stack_is_the_sum() -> None:
    both, base = fresh(stack((A, 1.0), (B, 0.5)), torch.float32), base_weights(torch.float32)
    for name in A.patches.keys() & B.patches.keys():
        one_by_one = (fresh(stack((A, 1.0)), torch.float32)[name] - base[name]) + (
            fresh(stack((B, 0.5)), torch.float32)[name] - base[name]
        )
        assert torch.allclose(both[name] - base[name], one_by_one, atol=1e-5)


def test_only_touched_weights_are_written() -> None:
    weights = bound()
    before = versions(weights)
    weights.refit(stack((A, 1.0)))
    assert {n for n, v in versions(weights).items() if v != before[n]} == A.patches.keys()
    before = versions(weights)
    report = weights.refit(stack((A, 1.0), (C, 1.0)))
    assert {n for n, v in versions(weights).items() if v != before[n]} == C.patches.keys(), "A was already applied"
    assert (report.layers, report.merged, report.restored) == (2, 2, 0)
    before = versions(weights)
    report = weights.refit(stack((C, 1.0)))
    assert {n for n, v in versions(weights).items() if v != before[n]} == A.patches.keys()
    assert (report.layers, report.merged, report.restored) == (4, 0, 4)


def test_an_untouched_weight_may_hold_anything() -> None:
    """A sentinel of NaNs in a weight that no LoRA touches stays, and spoils nothing."""
    weights = bound()
    sentinel = weights.tensors["single_blocks.0.linear2.weight"]
    sentinel.fill_(float("nan"))
    weights.refit(stack((A, 1.0), (B, 1.0)))
    weights.restore()
    assert sentinel.isnan().all()
    assert [n for n, t in weights.tensors.items() if not t.isfinite().all()] == ["single_blocks.0.linear2.weight"]


def test_a_change_in_place_of_an_untouched_weight_is_the_base_of_the_next_refit() -> None:
    weights = bound()
    weights.refit(stack((A, 1.0)))
    weights.restore()
    weights.tensors[QKV].mul_(2)
    doubled = weights.tensors[QKV].clone()
    weights.refit(stack((A, 1.0)))
    weights.restore()
    assert torch.equal(weights.tensors[QKV], doubled)


def test_addresses_never_change() -> None:
    weights = bound()
    addresses = {name: tensor.data_ptr() for name, tensor in weights.tensors.items()}
    for new in (stack((A, 1.0)), stack((B, 1.0), (C, 1.0)), {}):
        weights.refit(new)
        assert {name: tensor.data_ptr() for name, tensor in weights.tensors.items()} == addresses


def test_base_is_the_unmerged_weight() -> None:
    weights, base = bound(), base_weights()
    weights.refit(stack((A, 1.0)))
    assert all(torch.equal(weights.base(name), base[name]) for name in base)
    assert weights.base(SINGLE_NAMES[1]) is weights.tensors[SINGLE_NAMES[1]], "an untouched weight has no copy"


def test_needs_says_whether_a_refit_would_write() -> None:
    weights = bound()
    assert not weights.needs({})
    assert weights.needs(stack((A, 1.0)))
    weights.refit(stack((A, 1.0)))
    assert not weights.needs(stack((A, 1.0)))
    assert weights.needs(stack((A, 0.5)))
    assert weights.needs(stack((A, 1.0), (C, 1.0)))
    assert weights.needs({})


def test_plan_refit_touches_the_union_and_nothing_else() -> None:
    plan = plan_refit({"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 4, "d": 5})
    assert (plan.merge, plan.restore, plan.unchanged) == (("a", "c"), ("d",), ("b",))
    assert plan_refit({}, {"a": 1}).restore == ("a",)
    assert plan_refit({"a": 1}, {"a": 1}).merge == ()


# -- the fast path is merge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.37, -1.3, 0.0])
@pytest.mark.parametrize(
    "rows", [None, ((0, 64),), ((64, 128),), ((128, 192), (0, 64)), ((0, 64), (64, 128), (128, 192))]
)
def test_add_rows_has_the_bits_of_merged(
    rows: tuple[tuple[int, int], ...] | None, strength: float, dtype: torch.dtype
) -> None:
    base, generator = base_weights(dtype)[QKV], torch.Generator().manual_seed(9)
    patches = []
    for part in rows or (None,):
        size = (192 if part is None else part[1] - part[0], 64)
        patches.append((Patch(QKV, part, low_rank(size, 16, generator, scale=0.3)), strength))
    assert disjoint(patches)
    seen = torch.full_like(base, float("nan"))
    add_rows(seen, base, patches)
    assert torch.equal(seen, merged(base, patches).to(dtype))


def test_overlapping_or_other_changes_leave_the_fast_path() -> None:
    change = LowRank(torch.ones(1, 64), torch.ones(64, 1))
    replaced = Replacement(torch.zeros(64, 64))

    def patches(*rows: tuple[int, int] | None) -> list[tuple[Patch, float]]:
        return [(Patch(QKV, part, change), 1.0) for part in rows]

    assert not disjoint(patches((0, 64), (32, 96)))
    assert not disjoint(patches(None, (0, 64)))
    assert not disjoint(patches(None, None))
    assert not disjoint([(Patch(QKV, (0, 64), replaced), 1.0)])
    assert disjoint(patches((64, 128), (0, 64)))


def test_overlapping_loras_are_summed_before_rounding() -> None:
    """Two changes of half a rounding step each: rounded one by one, both would be lost."""
    weights = BoundWeights({"w": torch.ones(4, 4, dtype=torch.bfloat16)}, BaseWeights.AUTO)
    half = torch.full((4, 4), torch.finfo(torch.bfloat16).eps * 0.4)
    both = ((Patch("w", None, Difference(half)), 1.0), (Patch("w", None, Difference(half)), 1.0))
    weights.refit({"w": WeightPatches("both", both)})
    assert (weights.tensors["w"].float() == 1 + torch.finfo(torch.bfloat16).eps).all()


@pytest.mark.parametrize("share", [0.005, 0.01, 0.05])
@pytest.mark.parametrize("already", [False, True], ids=["from the base", "from another LoRA"])
def test_a_weak_lora_arrives_whole(share: float, already: bool) -> None:
    """The gain of a delta of 0.5 % to 5 % of the weight's size is 1, although bf16 has steps of 0.8 %."""
    generator = torch.Generator().manual_seed(4)
    weights = BoundWeights({"w": torch.randn(512, 256, generator=generator).to(torch.bfloat16)}, BaseWeights.AUTO)
    base = weights.tensors["w"].clone()
    if already:
        weights.refit(one("w", low_rank((512, 256), 4, generator, size=1.0), mark="other"))
    change = low_rank((512, 256), 16, generator, size=share * float(base.float().std()))
    weights.refit(one("w", change))
    wanted = change.delta("cpu") * change.scale
    arrived = weights.tensors["w"].float() - base.float()
    assert float((arrived * wanted).sum() / wanted.square().sum()) == pytest.approx(1.0, abs=0.03)


def test_something_else_is_done_while_the_gpu_merges_but_not_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is written by then, and known as applied."""
    weights, calls = bound(), []
    name = next(iter(stack((A, 1.0))))
    expected = bound()
    expected.refit(stack((A, 1.0)))
    weights.refit(stack((A, 1.0)), lambda: calls.append((weights.tensors[name].clone(), weights.touched)))
    assert torch.equal(calls[0][0], expected.tensors[name])
    assert calls[0][1] == frozenset(stack((A, 1.0)))

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(BoundWeights, "_write", fails)
    with pytest.raises(OutOfMemory):
        weights.refit(stack((B, 1.0)), lambda: calls.append((weights.tensors[name], weights.touched)))
    assert len(calls) == 1
