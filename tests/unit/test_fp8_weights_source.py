"""FP8 weights whose bases the program has anyway: none is kept, and every refit has the bits of kept ones."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests.unit.bound_weights import DOUBLE_NAMES, SINGLE_NAMES, base_weights, copied, differing, random_lora, stack
from tests.unit.fp8_simulation import is_modulation
from tests.unit.test_weights_source import Originals
from tests.unit.tiny_flux import shapes_of
from trt_core.config import BaseWeights
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import Fp8Config, plan_recipe
from trt_core.fp8_weights import BasePlace, Fp8Weights

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARCH = FluxArchitecture.from_shapes(shapes_of(base_weights()))
A = random_lora("a", DOUBLE_NAMES, 4, seed=1)
B = random_lora("b", (*DOUBLE_NAMES[2:], *SINGLE_NAMES), 8, seed=2)


def bound(source: Originals | None = None) -> Fp8Weights:
    place = BasePlace(BaseWeights.GPU, 10**9)
    return Fp8Weights(base_weights().items(), plan_recipe(ARCH, Fp8Config()), place, CPU, source=source)


def test_switches_have_the_bits_of_kept_bases() -> None:
    source, choices = Originals(), random.Random(3)
    weights = bound(source)
    untouched: dict[str, Tensor] = copied(weights)
    assert (source.reads, weights.base_host_bytes) == (0, 0)
    for _ in range(10):
        new = stack(
            *((each, choices.choice((1.0, 0.35, -0.8))) for each in choices.sample((A, B), 1 + choices.choice((0, 1))))
        )
        fresh = bound()
        fresh.refit(new)
        weights.refit(new)
        assert differing(weights, copied(fresh)) == []
    weights.restore()
    assert differing(weights, untouched) == []
    assert source.reads > 0


def test_a_refit_reads_only_what_it_touches() -> None:
    source = Originals()
    weights = bound(source)
    weights.refit(stack((A, 1.0)))
    assert source.reads == sum(not is_modulation(name) for name in A.patches)


def test_base_and_outline_are_those_of_kept_bases() -> None:
    weights, kept = bound(Originals()), bound()
    for name in kept.base_names:
        assert torch.equal(weights.base(name), kept.base(name))
    outlines = weights.outlines()
    assert {n: (t.shape, t.dtype) for n, t in outlines.items()} == {
        n: (t.shape, t.dtype) for n, t in kept.outlines().items()
    }
