"""Pinned host memory, with plain memory in its place: pieces apart, little of it wasted, all or none."""

from __future__ import annotations

import gc
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from trt_core import host_slabs
from trt_core.errors import OutOfMemory
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.weights import weight_shapes
from trt_core.host_slabs import HostSlabs

FLUX = FluxArchitecture(3072, 24, 19, 38, 64, 64, 4096, 768, 12288, guidance=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that were asked of the system. Slabs are 4 KiB at most."""
    sizes: list[int] = []

    def plain(size_bytes: int) -> torch.Tensor:
        sizes.append(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr(host_slabs, "_pinned", plain)
    monkeypatch.setattr(host_slabs, "_SLAB_BYTES", 4096)
    return sizes


def piece(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_pieces_of_a_slab_do_not_overlap(asked: list[int]) -> None:
    slabs, sizes, kinds = HostSlabs(), (3, 100, 700, 1, 900, 33), itertools.cycle((torch.float32, torch.bfloat16))
    likes = [torch.empty(size, 1, dtype=kind) for size, kind in zip(sizes, kinds, strict=False)]
    pieces = [slabs.take(like).fill_(index) for index, like in enumerate(likes)]
    for index, (taken, like) in enumerate(zip(pieces, likes, strict=True)):
        assert (taken.shape, taken.dtype) == (like.shape, like.dtype)
        assert (taken == index).all(), "a later piece was written into this one"
        assert taken.data_ptr() % 16 == pieces[0].data_ptr() % 16
    assert len(asked) == 2


def test_slabs_are_kept_and_a_large_weight_gets_its_own(asked: list[int]) -> None:
    slabs, wanted = HostSlabs(), [piece(size) for size in (3000, 3000, 10000, 500)]
    for _ in range(3):
        pieces = [slabs.take(like).fill_(index) for index, like in enumerate(wanted)]
        assert all((taken == index).all() for index, taken in enumerate(pieces))
        slabs.reset()
    assert asked == [4096, 4096, 10240], "the last one fits beside the first, and nothing is pinned again"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([256], [256]),
        ([300], [512]),
        ([1024, 512, 256], [1024, 512, 256]),
        ([3000, 1000], [4096]),
        ([2048, 2048, 2048, 200], [4096, 2048, 256]),
    ],
)
def test_no_slab_is_much_larger_than_what_is_still_needed(
    asked: list[int], sizes: list[int], expected: list[int]
) -> None:
    slabs = HostSlabs()
    for index, size in enumerate(sizes):
        slabs.take(piece(size), sum(sizes[index:]))
    assert asked == expected


@pytest.mark.parametrize("modulation", [True, False])
def test_all_linear_weights_of_flux_waste_little(modulation: bool) -> None:
    """By arithmetic alone: this takes 16 to 22 GiB."""
    sizes = sorted(
        (
            2 * shape[0] * shape[1]
            for name, shape in weight_shapes(FLUX).items()
            if len(shape) == 2 and "_blocks." in name and (modulation or "mod" not in name)
        ),
        reverse=True,
    )
    slabs: list[list[int]] = []
    for index, size in enumerate(sizes):
        slab = next((slab for slab in slabs if sum(slab[1:]) + size <= slab[0]), None)
        if slab is None:
            slabs.append(slab := [host_slabs._slab_bytes(size, sum(sizes[index:]))])
        slab.append(size)
    wasted = sum(slab[0] for slab in slabs) - sum(sizes)
    assert sum(sizes) > 15 * 2**30
    assert wasted < 0.5 * 2**30


def test_what_an_error_interrupts_is_given_back(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = HostSlabs()
    kept = slabs.take(piece(4096 - 512)).fill_(7)
    emptied: list[bool] = []
    monkeypatch.setattr(host_slabs, "empty_cache", lambda: emptied.append(True))

    def cancelled() -> None:
        with slabs.all_or_none():
            slabs.take(piece(512))
            slabs.take(piece(4096))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert slabs.free_bytes == 512
    assert emptied
    slabs.take(piece(512)).fill_(1)
    assert len(asked) == 2, "the first slab's rest is free again"
    assert (kept == 7).all()


def test_what_is_prepared_is_enough_and_little_more(asked: list[int]) -> None:
    slabs = HostSlabs()
    slabs.prepare(10_000)
    assert sum(asked) >= 10_000
    assert sum(asked) < 10_000 + 4096
    for _ in range(9):
        slabs.take(piece(1024), 0)
    assert sum(asked) < 10_000 + 4096, "nothing more was asked for"
    slabs.prepare(slabs.free_bytes)
    assert sum(asked) < 10_000 + 4096, "what is free is used"


def test_a_slab_that_cannot_be_pinned_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def second_fails(size_bytes: int) -> torch.Tensor:
        made.append(size_bytes)
        if len(made) > 1:
            raise OutOfMemory("no more")
        return torch.empty(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr(host_slabs, "_pinned", second_fails)
    slabs = HostSlabs()
    with pytest.raises(OutOfMemory):
        slabs.prepare(2**31)
    assert slabs.free_bytes == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_memory_that_cannot_be_pinned_says_what_to_do() -> None:
    with pytest.raises(OutOfMemory, match=r"could not be pinned.*base_weights=\"gpu\"") as caught:
        HostSlabs().take(torch.zeros(4))
    assert caught.value.widget == "base_weights"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_both_ways_pin(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(host_slabs.sys, "platform", platform)
    for _ in range(3):  # memory that was unpinned can be pinned again
        source = torch.arange(2**22, device="cuda")
        taken = HostSlabs().take(source).copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        assert taken.is_pinned()
        assert torch.equal(taken.to("cuda"), source)


@pytest.mark.skipif(sys.platform != "linux", reason="only there are slabs registered")
def test_memory_stays_pinned_while_a_parameter_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases of FP8 layers outlive the slabs: unpinned, each would be copied anew when the model is bound again."""
    unpinned: list[int] = []
    cuda = SimpleNamespace(cudaHostRegister=lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(host_slabs, "_unregister", unpinned.append)
    slabs, parameter = HostSlabs(), torch.nn.Parameter(torch.zeros(2, 8), requires_grad=False)
    base = slabs.take(torch.zeros(4, 8))
    address = base.data_ptr()
    parameter.data = base[:2]
    del slabs, base
    gc.collect()
    assert not unpinned
    parameter.data = torch.zeros(2, 8)
    gc.collect()
    assert unpinned == [address]
