"""The benchmark of products: it has all products of a step, and cuts where whole rounds of tiles end."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import products
from benchmarks.kernels import Call, gemm_work
from benchmarks.products import FULL, PYTORCH, TINY, Inputs, Product, in_turns, step_products, step_sums, ways

CPU = torch.device("cpu")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_all_products_of_a_steps_blocks(batch: int, fp8: bool) -> None:
    call = Call(batch, 4096, 512, fp8)
    found = sum(product.times * product.flops for product in step_products(FULL, call))
    work = gemm_work(FULL, call)
    if fp8:
        assert found == work.fp8_flops
    else:  # what lies beside the blocks: img_in, txt_in, final_layer
        assert 0.995 * work.bf16_flops < found < work.bf16_flops


def test_cuts() -> None:
    """132 multiprocessors: 36 tiles of rows by 12 of columns are three rounds and 36 tiles, 33 by 12 three rounds."""
    assert Product("linear2", 4608, 3072, 15360, 1).cut_rows(132) == 4224
    assert Product("proj", 4096, 3072, 3072, 1).cut_rows(132) is None, "the last round is nearly full"
    assert Product("whole", 4224, 3072, 3072, 1).cut_rows(132) is None
    assert Product("small", 512, 3072, 3072, 1).cut_rows(132) is None


@pytest.mark.parametrize("fp8", [False, True])
def test_every_product_runs(fp8: bool) -> None:
    for product in step_products(TINY, Call(1, 8, 4, fp8)):
        inputs = Inputs(product, CPU)
        calls = ways(inputs, 3)
        assert list(calls) == [PYTORCH]
        before = inputs.out.clone()
        found = in_turns(calls, CPU, 1, 0.1)
        assert found[PYTORCH] > 0
        assert not torch.equal(inputs.out, before)


def test_sums_weigh_how_often_a_product_is_made() -> None:
    lines = [
        {"times": 2, "ms": {PYTORCH: 3.0, "cuBLASLt 0": 2.0, "cuBLASLt 1": 1.0}},
        {"times": 1, "ms": {PYTORCH: 5.0}},
    ]
    assert step_sums(lines) == {PYTORCH: 11.0, "cuBLASLt 0": 9.0, "best": 7.0}


def test_from_start_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    products.main(["--tiny", "--batch", "1", "--turns", "1"])
    *lines, total = capsys.readouterr().out.splitlines()
    names = ["a large cube", *(product.name for product in step_products(TINY, Call(1, 64, 16)))]
    assert [json.loads(line)["name"] for line in lines] == names
    assert total.startswith("all products of a step, bf16, batch 1: PyTorch ")
