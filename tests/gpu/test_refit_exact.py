"""Refit on the GPU: the same bits from any past, from GPU and host bases, and a failure that leaves the weights."""

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
    base_weights,
    copied,
    differing,
    low_rank,
    one,
    random_lora,
    stack,
)
from trt_core.backends.check import relative_l2
from trt_core.config import BaseWeights
from trt_core.errors import OutOfMemory
from trt_core.lora.changes import Additive, Patch, merged
from trt_core.row_merge import add_rows
from trt_core.weights import BoundWeights, WeightPatches

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
A = random_lora("a", DOUBLE_NAMES, 4, seed=1)
B = random_lora("b", (*DOUBLE_NAMES[2:], *SINGLE_NAMES[:1]), 32, seed=2)
C = random_lora("c", SINGLE_NAMES[1:], 7, seed=3)
LAST = SINGLE_NAMES[2]


def bound(mode: BaseWeights, dtype: torch.dtype = torch.bfloat16) -> BoundWeights:
    return BoundWeights({name: tensor.to(DEVICE) for name, tensor in base_weights(dtype).items()}, mode)


def on_device(new: Mapping[str, WeightPatches]) -> dict[str, WeightPatches]:
    """The same patches with their factors on the GPU, as PEFT holds them."""
    return {
        name: WeightPatches(p.signature, tuple((patch.to(DEVICE), strength) for patch, strength in p.patches))
        for name, p in new.items()
    }


@pytest.mark.parametrize("mode", [BaseWeights.GPU, BaseWeights.HOST])
def test_thirty_random_switches_have_the_bits_of_fresh_ones(mode: BaseWeights) -> None:
    choices, weights = random.Random(5), bound(mode)
    for _ in range(30):
        loras = choices.sample((A, B, C), choices.randint(0, 3))
        new = on_device(stack(*((lora, choices.choice((1.0, 0.35, -0.8, 0.0))) for lora in loras)))
        weights.refit(new)
        fresh = bound(BaseWeights.GPU)  # the other mode: both must give the same bits
        fresh.refit(new)
        assert differing(weights, fresh.tensors) == []
    report = weights.refit({})
    assert differing(weights, bound(mode).tensors) == []
    assert weights.touched == frozenset()
    assert report.base_gpu_bytes == 0


def test_bases_lie_where_they_were_asked_for() -> None:
    on_gpu, on_host = bound(BaseWeights.GPU), bound(BaseWeights.HOST)
    reports = [weights.refit(on_device(stack((A, 1.0)))) for weights in (on_gpu, on_host)]
    assert reports[0].base_gpu_bytes == reports[1].base_host_bytes > 0
    assert reports[0].base_host_bytes == reports[1].base_gpu_bytes == 0
    name = DOUBLE_NAMES[0]
    assert on_gpu.base(name).device.type == DEVICE
    assert on_host.base(name).device.type == "cpu"
    assert on_host.base(name).is_pinned()
    assert torch.equal(on_host.base(name), base_weights()[name])


def test_factors_may_lie_in_host_memory() -> None:
    """LoRA files are read to the CPU; where the factors lie must not change a bit."""
    from_gpu, from_host = bound(BaseWeights.GPU), bound(BaseWeights.GPU)
    from_gpu.refit(on_device(stack((A, 0.7), (B, 1.0))))
    from_host.refit(stack((A, 0.7), (B, 1.0)))
    assert differing(from_host, from_gpu.tensors) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [4, 16, 128])
@pytest.mark.parametrize("rows", [None, ((0, 3072), (3072, 6144), (6144, 9216)), ((6144, 9216),)])
def test_the_fast_path_has_the_bits_of_merged(
    rows: tuple[tuple[int, int], ...] | None, rank: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(9216, 3072, generator=torch.Generator(DEVICE), device=DEVICE).mul_(0.02).to(dtype)
    patches = []
    for part in rows or (None,):
        size = (9216 if part is None else part[1] - part[0], 3072)
        change = low_rank(size, rank, generator, size=0.001, scale=0.3).to(DEVICE)
        patches.append((Patch("w", part, change), 0.7))
    seen = torch.full_like(base, float("nan"))
    add_rows(seen, base, patches)
    assert torch.equal(seen, merged(base, patches).to(dtype))


@pytest.mark.parametrize("share", [0.005, 0.05])
def test_a_weak_lora_arrives_whole(share: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = BoundWeights(
        {"w": torch.randn(3072, 3072, generator=generator).to(DEVICE, torch.bfloat16)}, BaseWeights.GPU
    )
    base = weights.tensors["w"].float()
    change = low_rank((3072, 3072), 16, generator, size=share * float(base.std())).to(DEVICE)
    weights.refit(one("w", change))
    wanted = change.delta(DEVICE) * change.scale
    arrived = weights.tensors["w"].float() - base
    assert float((arrived * wanted).sum() / wanted.square().sum()) == pytest.approx(1.0, abs=0.03)


# -- failures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Failing(Additive):
    """A change that runs out of memory."""

    scale: float = 1.0

    def delta(self, device: torch.device | str) -> Tensor:
        raise torch.OutOfMemoryError("provoked")


@pytest.mark.parametrize("mode", [BaseWeights.GPU, BaseWeights.HOST])
def test_a_failure_in_the_middle_leaves_the_lora_from_before(mode: BaseWeights) -> None:
    weights = bound(mode)
    weights.refit(on_device(stack((A, 0.8))))
    before = copied(weights)
    with pytest.raises(OutOfMemory, match="weights from before are back"):
        weights.refit(on_device(stack((B, 1.0))) | one(LAST, Failing()))
    assert weights.touched == A.patches.keys()
    # Put back by the CPU, which may round the last bit otherwise.
    assert all(relative_l2(tensor, before[name]) < 2e-3 for name, tensor in weights.tensors.items())
    weights.refit(on_device(stack((A, 0.8))))
    assert differing(weights, before) == []
    weights.refit({})
    assert differing(weights, bound(mode).tensors) == []


def test_real_lack_of_memory_in_the_middle_leaves_the_lora_from_before() -> None:
    """A weight of 128 MiB is merged last, with room for 64 MiB."""
    tensors = {name: tensor.to(DEVICE) for name, tensor in base_weights().items()}
    tensors["large"] = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    weights = BoundWeights(tensors, BaseWeights.HOST)
    weights.refit(on_device(stack((A, 0.8))))
    before = copied(weights)
    large = low_rank((8192, 8192), 16, torch.Generator().manual_seed(1)).to(DEVICE)
    new = on_device(stack((B, 1.0))) | one("large", large)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(OutOfMemory, match="base_weights"):
            weights.refit(new)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert weights.touched == A.patches.keys()
    assert all(relative_l2(tensor, before[name]) < 2e-3 for name, tensor in weights.tensors.items())
    assert not weights.tensors["large"].any()
    weights.refit(new)
    assert weights.tensors["large"].any(), "with room it works"
