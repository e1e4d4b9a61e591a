"""Base weights that the program has anyway: copied where there is room, given up at any time, always the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from trt_core import host_slabs
from trt_core.base_storage import BaseStorage
from trt_core.config import BaseWeights
from trt_core.errors import OutOfMemory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
SIZE = 6 * 4 + 4 * 2


class Originals:
    """A program's own weights in host memory, and how much it can spare."""

    def __init__(self, weights: Mapping[str, Tensor], gpu_bytes: int = 10**12, host_bytes: int = 10**12) -> None:
        self._weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.gpu_bytes, self.host_bytes = gpu_bytes, host_bytes
        self.reads: list[tuple[str, str]] = []
        self.gpu_is_full = False

    def read(self, name: str, device: torch.device) -> Tensor:
        self.reads.append((name, device.type))
        if device.type == "cuda" and self.gpu_is_full:
            raise torch.OutOfMemoryError("provoked")
        return self._weights[name].clone()  # here there is no GPU to copy to

    def spare_gpu_bytes(self) -> int:
        return self.gpu_bytes

    def spare_host_bytes(self) -> int:
        return self.host_bytes


def weights() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def free_gpu_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a GPU says is free, in the only item. Its memory, and pinned memory, is plain."""
    free = [80 * GIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(host_slabs, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    return free


def kept(mode: BaseWeights, source: Originals, device: torch.device = GPU) -> tuple[BaseStorage, dict[str, Tensor]]:
    """A storage that remembers the weights, which are changed since."""
    storage, bound = BaseStorage(mode, device, None, source), weights()
    storage.keep(bound)
    for tensor in bound.values():
        tensor.zero_()
    return storage, bound


def assert_exact(storage: BaseStorage) -> None:
    for name, tensor in weights().items():
        assert torch.equal(storage[name], tensor)
        assert storage[name].dtype is tensor.dtype


def places(storage: BaseStorage) -> tuple[int, int]:
    return storage.gpu_bytes, storage.host_bytes


@pytest.mark.parametrize("mode", BaseWeights)
def test_on_a_cpu_only_gpu_asks_for_copies(mode: BaseWeights) -> None:
    source = Originals(weights())
    storage, _ = kept(mode, source, CPU)
    assert places(storage) == ((SIZE, 0) if mode is BaseWeights.GPU else (0, 0))
    assert_exact(storage)
    assert bool(source.reads) == (mode is not BaseWeights.GPU)
    assert places(storage) == ((SIZE, 0) if mode is BaseWeights.GPU else (0, 0))


@pytest.mark.parametrize(
    ("mode", "spare_gpu", "spare_host", "expected"),
    [
        (BaseWeights.AUTO, SIZE, 0, (SIZE, 0)),
        (BaseWeights.AUTO, SIZE - 1, 4096, (0, SIZE)),
        (BaseWeights.AUTO, 0, SIZE - 1, (0, 0)),
        (BaseWeights.HOST, 10**12, 10**12, (0, SIZE)),
        (BaseWeights.HOST, 10**12, 0, (0, 0)),
        (BaseWeights.GPU, 0, 0, (SIZE, 0)),
    ],
)
def test_copies_go_where_the_program_has_room(
    free_gpu_bytes: list[int], mode: BaseWeights, spare_gpu: int, spare_host: int, expected: tuple[int, int]
) -> None:
    source = Originals(weights(), spare_gpu, spare_host)
    storage, _ = kept(mode, source)
    assert places(storage) == expected
    assert_exact(storage)


def test_the_gpus_own_figures_count_too(free_gpu_bytes: list[int]) -> None:
    free_gpu_bytes[0] = 3 * GIB + SIZE - 1
    assert places(kept(BaseWeights.AUTO, Originals(weights(), host_bytes=0))[0]) == (0, 0)


def test_what_is_read_has_the_bits_from_before(free_gpu_bytes: list[int]) -> None:
    storage, bound = kept(BaseWeights.AUTO, Originals(weights(), 0, 0))
    for _ in range(3):
        assert_exact(storage)
    bound["a"].fill_(5)
    assert_exact(storage)


def test_freed_copies_are_read_again(free_gpu_bytes: list[int]) -> None:
    source = Originals(weights(), host_bytes=0)
    storage, _ = kept(BaseWeights.AUTO, source)
    assert storage.free_gpu(1) == 6 * 4, "no more than was asked for, in whole weights"
    assert places(storage) == (4 * 2, 0)
    assert storage.free_gpu(1e32) == 4 * 2
    assert storage.free_gpu(1e32) == 0
    assert source.reads == []
    source.gpu_bytes = 0
    assert_exact(storage)
    assert places(storage) == (0, 0)


@pytest.mark.parametrize("mode", [BaseWeights.AUTO, BaseWeights.GPU])
def test_copies_come_back_to_the_gpu_when_there_is_room(free_gpu_bytes: list[int], mode: BaseWeights) -> None:
    source = Originals(weights(), host_bytes=0)
    storage, _ = kept(mode, source)
    storage.free_gpu(1e32)
    source.gpu_bytes = 4 * 2
    assert_exact(storage)
    assert places(storage) == (4 * 2, 0), "the larger one does not fit"
    source.reads.clear()
    assert_exact(storage)
    assert {name for name, _ in source.reads} == {"a"}


def test_copies_come_back_to_host_memory_when_there_is_room(free_gpu_bytes: list[int]) -> None:
    source = Originals(weights(), 0, 0)
    storage, _ = kept(BaseWeights.AUTO, source)
    source.host_bytes = 10**12
    assert_exact(storage)
    assert places(storage) == (0, SIZE)
    source.reads.clear()
    assert_exact(storage)
    assert source.reads == []


def test_host_memory_that_cannot_be_pinned_is_not_needed(
    free_gpu_bytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(size: int) -> Tensor:
        raise OutOfMemory("nothing can be pinned")

    monkeypatch.setattr(host_slabs, "_pinned", refused)
    storage, _ = kept(BaseWeights.HOST, Originals(weights()))
    assert places(storage) == (0, 0)
    assert_exact(storage)


def test_a_full_gpu_is_no_obstacle_to_a_rollback(free_gpu_bytes: list[int]) -> None:
    source = Originals(weights(), 0, 0)
    storage, _ = kept(BaseWeights.AUTO, source)
    source.gpu_is_full = True
    assert torch.equal(storage["a"], weights()["a"])
    assert source.reads == [("a", "cuda"), ("a", "cpu")]


def test_given_back_and_forgotten(free_gpu_bytes: list[int]) -> None:
    storage, _ = kept(BaseWeights.AUTO, Originals(weights(), 0, 0))
    storage.give_back("a")
    assert "a" not in storage
    with pytest.raises(KeyError):
        storage["a"]
    storage.forget()
    assert "b" not in storage


def test_pinned_memory_that_is_there_already_is_used(free_gpu_bytes: list[int]) -> None:
    slabs, source = host_slabs.HostSlabs(), Originals(weights(), 0)
    BaseStorage(BaseWeights.HOST, GPU, slabs, source).keep(weights())
    source.host_bytes = 0
    storage = BaseStorage(BaseWeights.HOST, GPU, slabs, source)
    storage.keep(weights())
    assert places(storage) == (0, SIZE)
