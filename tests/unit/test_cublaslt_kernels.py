"""Which kernel a product takes of those that were measured, how many rows at a time, and which products there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trt_core.flux import cublaslt_kernels
from trt_core.flux.cublaslt_kernels import CLUSTERS, OWN, TILES, Kernel, at_once, prefer, preferred
from trt_core.flux.products import Product
from trt_core.flux.rows import portions, together
from trt_core.kernel_ranking import _best, candidates

PICTURE = Product(4608, 9216, 3072)
TEXT = Product(512, 9216, 3072)
WIDE, SMALL = Kernel("128x256", "2x1", 5), Kernel("96x128", "1x1", 2)
OTHERS = [replace(PICTURE, **{name: True}) for name in ("fp8", "gelu", "onto")] + [
    Product(4608, 9216, 3080), Product(4608, 9232, 3072)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt_kernels, "_PREFERRED", {})


def test_the_kernel_that_was_measured_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preferred(0, PICTURE) is None
    prefer(0, {PICTURE: WIDE, TEXT: SMALL})
    assert preferred(0, PICTURE) == WIDE
    rows = {4096: WIDE, 9216: WIDE, 2400: WIDE, 2300: None, 9217: None, 1024: SMALL, 1025: None, 256: SMALL, 255: None}
    assert {n: preferred(0, replace(PICTURE, rows=n)) for n in rows} == rows
    assert [preferred(0, other) for other in OTHERS] == [None] * len(OTHERS)
    assert preferred(1, PICTURE) is None, "another GPU"
    prefer(0, {PICTURE: SMALL})
    assert preferred(0, PICTURE) == SMALL, "measured again"
    monkeypatch.setattr(cublaslt_kernels, "_PREFERRED", {})
    assert preferred(0, PICTURE) is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(4608, 4608), (4700, 4700), (6911, 6911), (6912, 3456), (9216, 4608), (13824, 4608), (16896, 4224), (4096, 4096)],
)
def test_many_rows_are_multiplied_as_they_were_measured(rows: int, expected: int) -> None:
    product = replace(PICTURE, rows=rows)
    assert at_once(0, product) is None
    prefer(0, {TEXT: SMALL})
    assert at_once(0, product) is None, "a few rows are no measure"
    prefer(0, {PICTURE: WIDE})
    assert at_once(0, product) == expected
    assert preferred(0, replace(product, rows=expected)) == WIDE


def test_few_rows_stay_together() -> None:
    prefer(0, {TEXT: SMALL, PICTURE: WIDE})
    assert at_once(0, replace(PICTURE, rows=1024)) is None


@pytest.mark.parametrize("most", [None, 5, 100])
def test_rows_and_portions(most: int | None) -> None:
    """Every row once, in order, with what belongs to it; pictures that lie apart are not copied."""
    whole = torch.arange(2 * 12 * 4.0).view(2, 12, 4)
    for x in (whole, whole[:, 5:], whole[0], whole[:, :, :2]):
        scale, out = x[..., :1].contiguous(), torch.zeros(x.shape)
        parts = [portion for tensors in together(x, scale, out) for portion in portions(most, *tensors)]
        for rows, scales, part in parts:
            assert most is None or len(rows) <= most
            assert torch.equal(rows[:, :1], scales)
            part.copy_(rows)
        assert torch.equal(out, x), "a part of the result is a copy"
        assert len({len(rows) for rows, _, _ in parts}) <= 2
    assert [x.data_ptr() for (x,) in together(whole[:, 5:])] == [whole[i, 5:].data_ptr() for i in range(2)]


@pytest.mark.parametrize("product", [PICTURE, TEXT, *OTHERS, replace(TEXT, fp8=True)])
def test_candidates_are_kernels_with_numbers(product: Product) -> None:
    found = candidates(product)
    assert 1 < len(found) == len(set(found)) == len({kernel.words() for kernel in found})
    assert all(k.tile in TILES and k.cluster in CLUSTERS and 0 <= k.option < 8 for k in found)


def test_a_kernel_is_taken_where_it_is_worth_it() -> None:
    assert _best({OWN: 1.0, WIDE: 0.995, SMALL: 1.2}) is None
    assert _best({OWN: 1.0, WIDE: 0.98, SMALL: 0.97}) == SMALL
    assert _best({OWN: 1.0}) is None
