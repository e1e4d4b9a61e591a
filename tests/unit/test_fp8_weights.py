"""Bound FP8 weights: each is its base plus patches, rounded once with a scale of its own; exact to switch and undo."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import (
    DOUBLE_NAMES,
    SINGLE_NAMES,
    Lora,
    base_weights,
    copied,
    differing,
    low_rank,
    one,
    random_lora,
    stack,
    versions,
)
from tests.unit.fp8_simulation import E4M3, round_fp8
from tests.unit.tiny_flux import shapes_of
from trt_core.block_precisions import BlockPrecisions
from trt_core.config import BaseWeights, CompileConfig
from trt_core.errors import OutOfMemory, UnsupportedModel
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import Activations, Fp8Config, Fp8Recipe, Granularity, block_linears, plan_recipe
from trt_core.fp8_weights import Fp8Weights, base_place
from trt_core.lora.changes import Additive, Difference, LowRank, Patch
from trt_core.mutable_module import MutableTRTModule
from trt_core.weights import WeightPatches

CPU = torch.device("cpu")
ARCH = FluxArchitecture.from_shapes(shapes_of(base_weights()))
NAMES = (*DOUBLE_NAMES, *SINGLE_NAMES)
QKV, MODULATION, LAST = DOUBLE_NAMES[0], SINGLE_NAMES[2], "single_blocks.1.modulation.lin.weight"
BIAS = "double_blocks.0.img_attn.proj.bias"
A = random_lora("a", DOUBLE_NAMES, 4, seed=1)
B = random_lora("b", (*DOUBLE_NAMES[:2], *SINGLE_NAMES[:2]), 8, seed=2)
C = random_lora("c", NAMES, 2, seed=3)
GRANULARITIES = pytest.mark.parametrize("per_row", [True, False], ids=["row", "tensor"])


def recipe(per_row: bool = True, *exclude: str, static: bool = False) -> Fp8Recipe:
    kinds = (Granularity.ROW if per_row else Granularity.TENSOR, Activations.STATIC if static else Activations.DYNAMIC)
    amax = {name: 1.0 + i for i, name in enumerate(block_linears(ARCH))} if static else None
    return plan_recipe(ARCH, Fp8Config(*kinds, exclude), amax)


def bound(per_row: bool = True, *exclude: str, dtype: torch.dtype = torch.bfloat16, static: bool = False) -> Fp8Weights:
    chosen = recipe(per_row, *exclude, static=static)
    place = base_place(BaseWeights.AUTO, ARCH, chosen, CPU, given_there=True)
    return Fp8Weights(base_weights(dtype).items(), chosen, place, CPU)


def scale_of(name: str) -> str:
    return name.removesuffix("weight") + "weight_scale"


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
    q, scale = round_fp8(merged, per_row)
    seen = weights.tensors[name]
    assert seen.dtype is E4M3
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
        assert is_rounded(weights, name, expected_merge(name, loras, dtype), per_row), name
    changed = {name.replace("weight_scale", "weight") for name in differing(weights, before)}
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


# -- how much of a small change is left --------------------------------------------------------------------------------


def _gain(merged_fp8: Tensor, base_fp8: Tensor, delta: Tensor) -> float:
    return float(((merged_fp8 - base_fp8) * delta).sum() / delta.square().sum())


def _wide_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(1024, 1024, generator=generator) / 32).bfloat16()
    delta = torch.randn(1024, 16, generator=generator) @ torch.randn(16, 1024, generator=generator)
    return base, delta / delta.square().mean().sqrt() * base.float().square().mean().sqrt()


@GRANULARITIES
@pytest.mark.parametrize("size", [0.005, 0.01, 0.05])
def test_the_gain_of_a_change_is_one(size: float, per_row: bool) -> None:
    """In the weight itself, where 0.5 % of it is a fraction of E4M3's step."""
    base, delta = _wide_weight()
    weights = _only(base, per_row)
    before = _dequantized(weights)
    weights.refit(one(_ONLY, Difference(delta * size)))
    assert 0.97 <= _gain(_dequantized(weights), before, delta * size) <= 1.03


@pytest.mark.parametrize(
    ("per_row", "size", "most"),
    [(True, 0.005, 0.4), (True, 0.01, 0.5), (True, 0.05, 0.97), (False, 0.005, 0.5), (False, 0.01, 0.6)],
)
def test_a_merge_into_the_rounded_weight_would_lose_it(per_row: bool, size: float, most: float) -> None:
    """Mutation: the same bound finds the mistake that everyone else makes. (With one scale for all, a change of 5 %
    moves that scale and with it every number of the grid, so there is nothing to find.)"""
    base, delta = _wide_weight()
    rounded = _dequantized(_only(base, per_row))
    weights = _only(rounded, per_row)
    before = _dequantized(weights)
    weights.refit(one(_ONLY, Difference(delta * size)))
    assert _gain(_dequantized(weights), before, delta * size) < most


_ONLY = "single_blocks.0.linear2.weight"


def _only(base: Tensor, per_row: bool) -> Fp8Weights:
    chosen = recipe(per_row)
    return Fp8Weights([(_ONLY, base)], chosen, base_place(BaseWeights.AUTO, ARCH, chosen, CPU, given_there=True), CPU)


def _dequantized(weights: Fp8Weights) -> Tensor:
    return weights.tensors[_ONLY].float() * weights.tensors[scale_of(_ONLY)]


# -- failures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Failing(Additive):
    error: type[BaseException]
    scale: float = 1.0

    def delta(self, device: torch.device | str) -> Tensor:
        raise self.error("provoked")


REASONS = [(torch.OutOfMemoryError, OutOfMemory), (KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, RuntimeError)]


def failing_after(wanted: Mapping[str, WeightPatches], error: type[BaseException]) -> dict[str, WeightPatches]:
    return {**wanted, **one(LAST, Failing(error))}


@GRANULARITIES
@pytest.mark.parametrize("applied", [((A, 0.8),), ((A, 0.8), (B, -0.5)), ((C, 1.0),), ()], ids=["a", "a+b", "c", ""])
@pytest.mark.parametrize(("provoked", "raised"), REASONS)
def test_a_failure_in_the_middle_rolls_back(
    provoked: type[BaseException], raised: type[BaseException], applied: tuple, per_row: bool
) -> None:
    weights = bound(per_row)
    weights.refit(stack(*applied))
    before, written = copied(weights), versions(weights)
    with pytest.raises(raised):
        weights.refit(failing_after(stack((B, 1.0)), provoked))
    assert sum(v != written[n] for n, v in versions(weights).items()) >= 5, "it was to fail in the middle"
    assert differing(weights, before) == []
    assert weights.touched == stack(*applied).keys()
    following = stack((B, 0.3))
    weights.refit(following)
    clean = bound(per_row)
    clean.refit(following)
    assert differing(weights, copied(clean)) == []


def test_a_failure_within_one_weight_leaves_no_row_behind() -> None:
    """q is merged already when v's change fails: q's rows and their scales go back, too."""
    weights, change = bound(), low_rank((64, 64), 4, torch.Generator().manual_seed(5))
    before = copied(weights)
    patches = ((Patch(QKV, (0, 64), change), 1.0), (Patch(QKV, (128, 192), Failing(RuntimeError)), 1.0))
    with pytest.raises(RuntimeError, match="provoked"):
        weights.refit({QKV: WeightPatches("half", patches)})
    assert differing(weights, before) == []


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
