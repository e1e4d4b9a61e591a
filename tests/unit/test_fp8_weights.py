"""Bound FP8 weights: each is its base plus patches, rounded once with a scale of its own; exact to switch and undo."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import (
    Lora,
    base_weights,
    copied,
    differing,
    low_rank,
    one,
    stack,
    versions,
)
from tests.unit.fp8_bound import (
    ARCH,
    BIAS,
    CPU,
    GRANULARITIES,
    QKV,
    A,
    B,
    C,
    bound,
    recipe,
    scale_of,
)
from tests.unit.fp8_simulation import E4M3, is_modulation, round_weight
from trt_core.block_precisions import BlockPrecisions
from trt_core.config import BaseWeights, CompileConfig
from trt_core.errors import UnsupportedModel
from trt_core.fp8_recipe import block_linears
from trt_core.fp8_weights import Fp8Weights, base_place
from trt_core.lora.changes import Difference, LowRank, Patch
from trt_core.mutable_module import MutableTRTModule
from trt_core.weights import WeightPatches


def expected_merge(name: str, loras: tuple[tuple[Lora, float], ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """fp32, with every product and sum written out: base + strength * scale * (up @ down), one LoRA after another."""
    merged = base_weights(dtype)[name].float()
    for lora, strength in loras:
        for patch in lora.patches.get(name, ()):
            start, stop = patch.rows or (0, merged.shape[0])
            change = patch.change
            assert isinstance(change, LowRank)
            if strength:
                merged[start:stop] += (change.up.float() @ change.down.float()) * (strength * change.scale)
    return merged


def is_rounded(weights: Fp8Weights, name: str, merged: Tensor, per_row: bool) -> bool:
    q, scale = round_weight(name, merged, per_row)
    seen = weights.tensors[name]
    assert seen.dtype is q.dtype
    return torch.equal(seen.float(), q.float()) and torch.equal(weights.tensors[scale_of(name)], scale)


# -- bound at first ----------------------------------------------------------------------------------------------------


@GRANULARITIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_at_first_every_weight_is_its_base_rounded(dtype: torch.dtype, per_row: bool) -> None:
    weights, given = bound(per_row, dtype=dtype), base_weights(dtype)
    matrices = {f"{name}.weight" for name in block_linears(ARCH)}
    assert all(is_rounded(weights, name, given[name].float(), per_row) for name in matrices)
    others = set(given) - matrices
    assert all(torch.equal(weights.tensors[name], given[name]) for name in others)
    assert weights.base_names == list(given)
    assert set(weights.tensors) == set(given) | {scale_of(name) for name in matrices}
    assert (weights.dtype, weights.touched) == (dtype, frozenset())
    assert all(torch.equal(weights.base(name), tensor) for name, tensor in given.items())


def test_what_is_excluded_stays() -> None:
    weights, given = bound(True, "double_blocks.0.img_attn.*", "*.linear1"), base_weights()
    for name in (QKV, "double_blocks.0.img_attn.proj.weight", "single_blocks.0.linear1.weight"):
        assert torch.equal(weights.tensors[name], given[name])
        assert scale_of(name) not in weights.tensors
    assert weights.tensors["single_blocks.0.linear2.weight"].dtype is E4M3


def test_static_scales_of_inputs_are_bound_beside_the_weights() -> None:
    chosen, weights = recipe(static=True), bound(static=True)
    for layer in chosen.activation_linears:
        scale = weights.tensors[f"{layer}.input_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, (1,))
        assert float(scale) == pytest.approx(chosen.input_amax[layer] * 2.0 / 448, rel=1e-6)
    assert not [n for n in weights.tensors if n.endswith("mod.lin.input_scale")]


def test_what_is_read_without_compiling_is_what_the_products_see() -> None:
    weights = bound()
    q, scale = weights.tensors[QKV], weights.tensors[scale_of(QKV)]
    assert torch.equal(weights.readable(QKV), (q.float() * scale).bfloat16())
    assert weights.readable("img_in.weight") is weights.tensors["img_in.weight"]
    assert weights.readable("no.weight") is None


def test_each_base_is_told_at_once_and_is_what_was_given() -> None:
    given, told = base_weights(), {}
    place = base_place(BaseWeights.AUTO, ARCH, recipe(), CPU, given_there=True)
    weights = Fp8Weights(given.items(), recipe(), place, CPU, told.__setitem__)
    assert list(told) == list(given)
    assert all(told[name].data_ptr() == given[name].data_ptr() for name in given)
    assert weights.base_gpu_bytes == 0
    assert weights.base_host_bytes == sum(given[f"{name}.weight"].nbytes for name in block_linears(ARCH))


# -- merging -----------------------------------------------------------------------------------------------------------

STACKS = {
    "one": ((A, 1.0),),
    "strength": ((A, 0.37),),
    "negative": ((B, -1.0),),
    "zero": ((A, 0.0),),
    "zero beside another": ((C, 0.0), (C, 1.0)),
    "two on the same rows": ((A, 1.0), (B, 0.5)),
    "three": ((A, 1.0), (B, -0.5), (C, 0.25)),
    "modulations too": ((C, 1.0),),
}


@GRANULARITIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loras", STACKS.values(), ids=STACKS)
def test_merged_is_base_plus_patches_rounded_once(
    loras: tuple[tuple[Lora, float], ...], dtype: torch.dtype, per_row: bool
) -> None:
    weights, before = bound(per_row, dtype=dtype), copied(bound(per_row, dtype=dtype))
    weights.refit(stack(*loras))
    touched = {name for lora, _ in loras for name in lora.patches}
    for name in touched:
        whole, base = expected_merge(name, loras, dtype), base_weights(dtype)[name].float()
        assert is_rounded(weights, name, base if is_modulation(name) else whole, per_row), name
        if is_modulation(name):
            beside = copied(weights)[name.replace(".weight", ".beside")]
            assert torch.allclose(beside, whole - base, rtol=1e-3, atol=1e-5), name
    changed = {
        name.replace("weight_scale", "weight").replace("beside", "weight") for name in differing(weights, before)
    }
    assert changed <= touched, "a weight that no LoRA touches was written"
    assert (changed == touched) is any(strength for _, strength in loras)
    weights.restore()
    assert differing(weights, before) == []


@GRANULARITIES
def test_part_of_a_fused_weight(per_row: bool) -> None:
    """Only k's rows: with a scale per row, q and v keep their bits; with one scale, all are rounded anew."""
    generator, base = torch.Generator().manual_seed(5), base_weights()[QKV].float()
    change = low_rank((64, 64), 4, generator, size=2.0)
    weights, before = bound(per_row), copied(bound(per_row))
    weights.refit({QKV: WeightPatches("k", ((Patch(QKV, (64, 128), change), 1.0),))})
    merged = base.clone()
    merged[64:128] += (change.up.float() @ change.down.float()) * change.scale
    assert is_rounded(weights, QKV, merged, per_row)
    other = torch.cat((torch.arange(64), torch.arange(128, 192)))
    same = torch.equal(weights.tensors[QKV].float()[other], before[QKV].float()[other])
    assert same is per_row


def test_a_scale_is_the_merged_weights_own() -> None:
    """A LoRA that makes a row ten times larger is not cut off at the base's range."""
    weights = bound()
    base = base_weights()[QKV].float()
    weights.refit(one(QKV, Difference(base * 9)))
    seen = weights.tensors[QKV].float() * weights.tensors[scale_of(QKV)]
    assert float((seen / (base * 10))[base.abs() > 1e-3].mean()) == pytest.approx(1.0, abs=0.01)
    assert float((seen - base * 10).norm() / (base * 10).norm()) < 0.03


def test_a_bias_is_merged_in_the_models_dtype() -> None:
    weights, diff = bound(), torch.full((64,), 0.25)
    weights.refit(one(BIAS, Difference(diff)))
    assert torch.equal(weights.tensors[BIAS], (base_weights()[BIAS].float() + 0.25).bfloat16())
    weights.restore()
    assert torch.equal(weights.tensors[BIAS], base_weights()[BIAS])


@GRANULARITIES
def test_a_to_b_is_a_fresh_b_and_none_is_the_base(per_row: bool) -> None:
    weights, fresh = bound(per_row), bound(per_row)
    weights.refit(stack((A, 1.0), (C, 0.5)))
    report = weights.refit(stack((B, 0.8)))
    fresh.refit(stack((B, 0.8)))
    assert differing(weights, copied(fresh)) == []
    assert (report.merged, report.restored) == (len(B.patches), len(set(A.patches) | set(C.patches)) - len(B.patches))
    weights.restore()
    assert differing(weights, copied(bound(per_row))) == []


@GRANULARITIES
def test_fifty_random_switches_drift_by_nothing(per_row: bool) -> None:
    weights, choices = bound(per_row), random.Random(0)
    for _ in range(50):
        loras = choices.sample([A, B, C], choices.randint(0, 3))
        wanted = stack(*((lora, choices.choice([-1.0, -0.3, 0.0, 0.5, 1.0])) for lora in loras))
        weights.refit(wanted)
    fresh = bound(per_row)
    fresh.refit(wanted)
    assert differing(weights, copied(fresh)) == []
    weights.restore()
    assert differing(weights, copied(bound(per_row))) == []
    assert all(torch.equal(weights.base(name), tensor) for name, tensor in base_weights().items())


def test_equal_patches_write_nothing() -> None:
    weights = bound()
    weights.refit(stack((A, 1.0)))
    written = versions(weights)
    assert not weights.needs(stack((A, 1.0)))
    weights.refit(stack((A, 1.0)))
    assert versions(weights) == written


# -- the module that binds them ----------------------------------------------------------------------------------------


def module() -> MutableTRTModule:
    return MutableTRTModule(ARCH, CompileConfig())


@pytest.mark.parametrize("fault", ["missing", "another shape", "mixed dtypes"])
def test_unfit_weights_are_refused_before_anything_is_bound(fault: str) -> None:
    weights = base_weights()
    if fault == "missing":
        del weights[QKV]
    elif fault == "another shape":
        weights[QKV] = weights[QKV][:-1]
    else:
        weights[QKV] = weights[QKV].float()
    names = list(weights)
    with pytest.raises(UnsupportedModel):
        module().load_fp8(weights, recipe(), CPU, lambda name, base: None)
    assert list(weights) == names, "what is refused is left with the caller"


def test_loading_takes_the_weights_one_by_one() -> None:
    weights, seen = base_weights(), []
    loaded = module()
    loaded.load_fp8(weights, recipe(), CPU, lambda name, base: seen.append((name, len(weights))))
    assert weights == {}
    assert [left for _, left in seen] == list(range(len(seen) - 1, -1, -1))
    assert loaded.weights.dtype is torch.bfloat16


def test_blocks_alone_may_be_made_one_by_one() -> None:
    blocks = {n: t for n, t in base_weights().items() if n.startswith(("double_blocks.", "single_blocks."))}
    made = []

    def items():
        for name, tensor in blocks.items():
            made.append(name)
            yield name, tensor

    loaded = module()
    loaded.load_blocks(items(), CPU, recipe())
    assert made == list(blocks)
    whole = bound()
    assert all(torch.equal(t.float(), whole.tensors[n].float()) for n, t in loaded.weights.tensors.items())
    precisions = BlockPrecisions.of(ARCH, recipe())
    assert [len(w.before) for w in precisions.weights(loaded.weights.tensors)[0]] == [10, 10]


def test_blocks_that_lack_a_weight_are_refused() -> None:
    blocks = {n: t for n, t in base_weights().items() if n.startswith(("double_blocks.", "single_blocks."))}
    del blocks[QKV]
    with pytest.raises(UnsupportedModel):
        module().load_blocks(blocks.items(), CPU, recipe())
