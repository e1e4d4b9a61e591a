"""Refits that take the merge kernels: any rows, any stack, from any past."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import low_rank
from trt_core import weights
from trt_core.config import BaseWeights
from trt_core.flux import fp8
from trt_core.lora.changes import Difference, LowRank, Patch, merged
from trt_core.low_rank import Term
from trt_core.low_rank_merge import Merges
from trt_core.merge_table import Fp8Place
from trt_core.weights import BoundWeights, WeightPatches

from .merging import (
    BF16,
    DEVICE,
    DIGITS,
    FP16,
    FP32,
    assert_rounded_once,
    bits,
    fp8_canvas,
    needs_fp8,
    normal,
)

pytest.importorskip("triton")
Patches = Sequence[tuple[Patch, float]]
SHAPE = (192, 512)
QKV = ((0, 64), (64, 128), (128, 192))


def patch(rows: tuple[int, int] | None, seed: int, strength: float = 0.7, rank: int = 16) -> tuple[Patch, float]:
    size = (SHAPE[0] if rows is None else rows[1] - rows[0], SHAPE[1])
    change = low_rank(size, rank, torch.Generator().manual_seed(seed), scale=0.3)
    return Patch("w", rows, change), strength


STACKS: dict[str, Patches] = {
    "q, k, v": [patch(rows, seed) for seed, rows in enumerate(QKV)],
    "k alone": [patch(QKV[1], 1, -1.3)],
    "two of them": [patch(None, 1), patch(None, 2, -0.4)],
    "fused and q, k, v": [patch(None, 1), *(patch(rows, 2 + seed, -0.4) for seed, rows in enumerate(QKV))],
    "overlapping": [patch((0, 128), 1), patch((64, 192), 2, 0.2), patch((32, 80), 3, 1.5)],
    "strength 0": [patch(None, 1, 0.0)],
    "one of strength 0": [patch(None, 1, 0.0), patch(QKV[2], 2)],
}


def moved(patches: Patches) -> Patches:
    return [(part.to(DEVICE), strength) for part, strength in patches]


def bound() -> BoundWeights:
    return BoundWeights({"w": normal(*SHAPE, dtype=BF16)}, BaseWeights.GPU)


def refit(loaded: BoundWeights, patches: Patches) -> Tensor:
    loaded.refit({"w": WeightPatches(object(), tuple(patches))})
    return loaded.tensors["w"]


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit that would not take the kernels fails."""
    for name in ("disjoint", "merged"):
        monkeypatch.delattr(weights, name)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("name", STACKS)
def test_a_refit_is_the_sum_of_the_patches(name: str) -> None:
    base, seen = bound().tensors["w"], refit(bound(), moved(STACKS[name]))
    total = base.cpu().double()
    for part, strength in STACKS[name]:
        start, stop = part.rows or (0, SHAPE[0])
        assert isinstance(part.change, LowRank)
        factor = strength * part.change.scale
        total[start:stop] += factor * (part.change.up.double() @ part.change.down.double())
    steps = torch.exp2(torch.frexp(total).exponent.double() - DIGITS[BF16])
    assert ((seen.cpu().double() - total).abs() <= 0.5 * steps + 1e-5).all()


@pytest.mark.usefixtures("kernels_only")
def test_rows_without_a_patch_have_the_bits_of_the_base() -> None:
    base = bound().tensors["w"]
    base[0, 0] = -0.0
    assert torch.equal(bits(refit(bound(), moved(STACKS["strength 0"]))), bits(bound().tensors["w"]))
    seen = refit(BoundWeights({"w": base.clone()}, BaseWeights.GPU), moved(STACKS["k alone"]))
    assert torch.equal(bits(seen[:64]), bits(base[:64]))
    assert torch.equal(bits(seen[128:]), bits(base[128:]))
    assert not torch.equal(seen[64:128], base[64:128])


@pytest.mark.usefixtures("kernels_only")
def test_a_to_b_is_a_fresh_b() -> None:
    loaded = bound()
    for name in (*STACKS, *reversed(STACKS)):
        assert torch.equal(refit(loaded, moved(STACKS[name])), refit(bound(), moved(STACKS[name]))), name
    loaded.restore()
    assert torch.equal(loaded.tensors["w"], bound().tensors["w"])


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_factors_in_host_memory_and_in_other_dtypes(dtype: torch.dtype) -> None:
    """As ComfyUI and LoRA files bring them; where they lie changes no bit."""
    part, strength = patch(None, 1)
    assert isinstance(part.change, LowRank)
    change = LowRank(part.change.down.to(dtype), part.change.up.to(dtype), part.change.scale)
    seen = refit(bound(), [(Patch("w", None, change), strength)])
    assert torch.equal(seen, refit(bound(), moved([(Patch("w", None, change), strength)])))
    assert_rounded_once(
        seen, bound().tensors["w"], [Term(change.up.to(DEVICE), change.down.to(DEVICE), strength * change.scale)]
    )


def test_other_changes_take_the_way_they_took() -> None:
    patches = moved([patch(None, 1), (Patch("w", QKV[0], Difference(torch.ones(64, SHAPE[1]))), 0.5)])
    base = bound().tensors["w"]
    assert not Merges(base.device).add(torch.empty_like(base), base, patches, lent=False)
    assert torch.equal(refit(bound(), patches), merged(base, patches).to(BF16))


@needs_fp8
@pytest.mark.parametrize("name", STACKS)
def test_fp8_rows_are_merged_one_by_one(name: str) -> None:
    base, patches = bound().tensors["w"], moved(STACKS[name])
    _, _, weight, scale = fp8_canvas(SHAPE)
    merges = Merges(base.device)
    assert merges.add_fp8(Fp8Place(weight, scale), base, patches, lent=False)
    merges.finish()
    total = merged(base, patches)
    assert torch.allclose(scale, fp8.row_scale(total), rtol=1e-5)
    assert (bits(weight) != bits(fp8.quantize_tensor(total, scale))).float().mean() < 2e-3
    if name == "strength 0":
        assert torch.equal(bits(weight), bits(fp8.merge_quantize(base, None, 1.0)[0]))
