"""Base weights of touched layers: copied once, given back, counted."""

from __future__ import annotations

import pytest
import torch

from trt_core.base_storage import BaseStorage, _Place, spare_gpu_bytes
from trt_core.config import BaseWeights

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
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    gpu = torch.device("cuda", 0)
    where = BaseStorage(BaseWeights.AUTO, gpu)._where
    assert where(2 * 2**30) is _Place.GPU
    assert where(2 * 2**30 + 1) is _Place.HOST, "3 GiB stay free for activations"
    assert BaseStorage(BaseWeights.GPU, gpu)._where(10**12) is _Place.GPU
    assert BaseStorage(BaseWeights.HOST, gpu)._where(1) is _Place.HOST


def test_what_tensors_may_take_ends_at_the_processs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds what PyTorch has and does not use."""
    facts = {"mem_get_info": (50, 80), "memory_reserved": 20, "memory_allocated": 14}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for fraction, spare in ((1.0, 56), (0.5, 26), (0.1, -6)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, f=fraction: f)
        assert spare_gpu_bytes(torch.device("cuda", 0)) == spare
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert spare_gpu_bytes(torch.device("cuda", 0)) == 56, "a PyTorch that does not tell"


def test_without_a_source_nothing_on_a_cpu_can_be_freed(storage: BaseStorage) -> None:
    storage.keep(weights())
    held = storage.gpu_bytes
    assert storage.free_gpu(1e32) == 0
    assert storage.gpu_bytes == held
