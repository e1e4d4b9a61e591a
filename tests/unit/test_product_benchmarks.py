"""The benchmark of products: it has all products of a step."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import products
from benchmarks.kernels import Call, gemm_work
from benchmarks.products import BY_CUBLASLT, FULL, PYTORCH, TINY, step_products, step_sums, ways
from trt_core.kernel_ranking import ProductInputs
from trt_core.measure import settled_milliseconds

CPU = torch.device("cpu")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("joined", [False, True])
def test_all_products_of_a_steps_blocks(joined: bool, batch: int, fp8: bool) -> None:
    call = Call(batch, 4096, 512, fp8)
    found = sum(made.times * made.product.flops for made in step_products(FULL, call, joined))
    work = gemm_work(FULL, call)
    if fp8:
        assert found == work.fp8_flops
    else:  # what lies beside the blocks: img_in, txt_in, final_layer
        assert 0.995 * work.bf16_flops < found < work.bf16_flops


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_every_product_runs(fp8: bool, joined: bool) -> None:
    for step_product in step_products(TINY, Call(1, 8, 4, fp8), joined):
        inputs = ProductInputs(step_product.product, CPU)
        calls = ways(inputs)
        assert list(calls) == [PYTORCH]
        before = inputs.out.clone()
        assert settled_milliseconds(calls, CPU, 0.1, 0.1)[PYTORCH] > 0
        assert not torch.equal(inputs.out, before)


def test_sums_weigh_how_often_a_product_is_made() -> None:
    lines = [
        {"times": 2, "ms": {PYTORCH: 3.0, BY_CUBLASLT: 2.0, "cuBLASLt 128x128, 2x1, 1": 1.0}},
        {"times": 1, "ms": {PYTORCH: 5.0}},
    ]
    assert step_sums(lines) == {PYTORCH: 11.0, BY_CUBLASLT: 9.0, "best": 7.0}


def test_from_start_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    products.main(["--tiny", "--batch", "1"])
    *lines, total = capsys.readouterr().out.splitlines()
    names = ["a large cube", *(product.name for product in step_products(TINY, Call(1, 64, 16)))]
    assert [json.loads(line)["name"] for line in lines] == names
    assert total.startswith("all products of a step, bf16, batch 1: PyTorch ")
