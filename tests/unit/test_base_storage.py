"""Base weights of touched layers: copied once, given back, counted."""

from __future__ import annotations

import pytest
import torch

from trt_core import base_storage
from trt_core.base_storage import BaseStorage
from trt_core.config import BaseWeights
from trt_core.errors import OutOfMemory

CPU = torch.device("cpu")


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture(params=BaseWeights)
def storage(request: pytest.FixtureRequest) -> BaseStorage:
    """On a CPU all modes keep plain copies: there is no GPU to spare."""
    return BaseStorage(request.param, CPU)


def test_a_copy_survives_the_change_of_the_weight(storage: BaseStorage) -> None:
    bound = weights()
    storage.keep(bound)
    bound["a"].zero_()
    assert torch.equal(storage["a"], weights()["a"])
    assert storage["b"].dtype is torch.bfloat16
    assert storage["a"].data_ptr() != bound["a"].data_ptr()


def test_what_is_kept_already_is_not_copied_again(storage: BaseStorage) -> None:
    bound = weights()
    storage.keep(bound)
    bound["a"].zero_()
    storage.keep({"a": bound["a"], "c": torch.ones(3)})
    assert torch.equal(storage["a"], weights()["a"]), "the changed weight took the place of the base"
    assert "c" in storage


def test_bytes_are_counted(storage: BaseStorage) -> None:
    assert storage.gpu_bytes + storage.host_bytes == 0
    storage.keep(weights())
    assert storage.gpu_bytes + storage.host_bytes == 6 * 4 + 4 * 2
    storage.give_back("a")
    assert storage.gpu_bytes + storage.host_bytes == 4 * 2


def test_given_back_is_gone_and_may_be_kept_again(storage: BaseStorage) -> None:
    storage.keep(weights())
    storage.give_back("a")
    assert "a" not in storage
    assert "b" in storage
    with pytest.raises(KeyError):
        storage["a"]
    storage.keep({"a": torch.zeros(2, 3)})
    assert not storage["a"].any()


def test_giving_back_what_was_never_kept_is_no_error(storage: BaseStorage) -> None:
    storage.give_back("a")
    assert "a" not in storage


def test_forget_drops_everything(storage: BaseStorage) -> None:
    storage.keep(weights())
    storage.forget()
    assert "a" not in storage
    assert "b" not in storage
    assert storage.gpu_bytes + storage.host_bytes == 0


def test_keeping_nothing_is_no_error(storage: BaseStorage) -> None:
    storage.keep({})
    assert storage.gpu_bytes == 0


def test_where_bases_go_on_a_gpu_is_decided_from_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = 5 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    gpu = torch.device("cuda", 0)
    where = BaseStorage(BaseWeights.AUTO, gpu)._where
    assert where(2 * 2**30) is BaseWeights.GPU
    assert where(2 * 2**30 + 1) is BaseWeights.HOST, "3 GiB stay free for activations"
    assert BaseStorage(BaseWeights.GPU, gpu)._where(10**12) is BaseWeights.GPU
    assert BaseStorage(BaseWeights.HOST, gpu)._where(1) is BaseWeights.HOST


# -- pinned host memory, with plain memory in its place --------------------------------------------------------------


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> tuple[base_storage.HostSlabs, list[int]]:
    """Slabs of 4 KiB, and the sizes that were asked of the system."""
    asked: list[int] = []

    def plain(size_bytes: int) -> torch.Tensor:
        asked.append(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr(base_storage, "_pinned", plain)
    monkeypatch.setattr(base_storage, "_SLAB_BYTES", 4096)
    return base_storage.HostSlabs(), asked


def test_pieces_of_a_slab_do_not_overlap(slabs: tuple[base_storage.HostSlabs, list[int]]) -> None:
    sizes, kinds = (3, 100, 700, 1, 900, 33), (torch.float32, torch.bfloat16)
    likes = [torch.empty(size, 1, dtype=kinds[index % 2]) for index, size in enumerate(sizes)]
    pieces = [slabs[0].take(like).fill_(index) for index, like in enumerate(likes)]
    for index, (piece, like) in enumerate(zip(pieces, likes, strict=True)):
        assert (piece.shape, piece.dtype) == (like.shape, like.dtype)
        assert (piece == index).all(), "a later piece was written into this one"
        assert piece.data_ptr() % 16 == pieces[0].data_ptr() % 16


def test_slabs_are_kept_and_a_large_weight_gets_its_own(slabs: tuple[base_storage.HostSlabs, list[int]]) -> None:
    wanted = [torch.empty(size, dtype=torch.uint8) for size in (3000, 3000, 10000, 500)]
    for _ in range(3):
        pieces = [slabs[0].take(like).fill_(index) for index, like in enumerate(wanted)]
        assert all((piece == index).all() for index, piece in enumerate(pieces))
        slabs[0].reset()
    assert slabs[1] == [4096, 4096, 10240], "the last one fits beside the first, and nothing is pinned again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_memory_that_cannot_be_pinned_says_what_to_do() -> None:
    with pytest.raises(OutOfMemory, match=r"could not be pinned.*base_weights=\"gpu\"") as caught:
        base_storage.HostSlabs().take(torch.zeros(4))
    assert caught.value.widget == "base_weights"
