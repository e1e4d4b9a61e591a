"""The table that merge kernels read, and what they are compiled for."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from trt_core.low_rank import Term
from trt_core.merge_table import (
    FIELDS,
    TERM_FIELDS,
    WHOLE_ROWS,
    WHOLE_WIDTH,
    Fp8Place,
    Kind,
    Merge,
    alike,
    planned,
)

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


def aligned(*shape: int, dtype: torch.dtype = BF16, skip: int = 0) -> Tensor:
    """At an address that is a multiple of 64 bytes, and `skip` elements on."""
    size, count = torch.empty(0, dtype=dtype).element_size(), torch.Size(shape).numel()
    whole = torch.zeros(count + 128, dtype=dtype)
    start = -whole.data_ptr() % 64 // size + skip
    return whole[start : start + count].view(shape)


def term(rows: int, width: int, rank: int = 16, dtype: torch.dtype = BF16, skip: int = 0) -> Term:
    return Term(aligned(rows, rank, dtype=dtype), aligned(rank, width, dtype=dtype, skip=skip), 0.3)


def kind(rows: int = 64, width: int = 256, base: Tensor | None = None, *terms: Term) -> Kind:
    base = aligned(rows, width) if base is None else base
    return planned(Merge(0, rows, base, base, terms or (term(rows, width),))).kind


def test_the_usual_lora_has_no_edges() -> None:
    assert kind() == Kind(BF16, BF16, BF16, False, 1, 16, False, True, True, False)


def test_rows_of_a_fused_matrix_have_none_either() -> None:
    qkv = aligned(9216, 3072)
    for start in (0, 3072, 6144):
        found = planned(Merge(start, start + 3072, qkv, qkv, (term(3072, 3072),)))
        assert found.kind.whole
        assert found.fields[0] == qkv.data_ptr() + start * 3072 * 2
        assert found.fields[8:10] == [3072, 3072]


@pytest.mark.parametrize(
    "found",
    [
        kind(65),
        kind(64, 264),
        kind(64, 256, aligned(64, 256, skip=1)),
        kind(64, 256, aligned(64, 257)[:, :256]),
        kind(64, 256, None, term(64, 256, skip=4)),
    ],
    ids=["rows", "width", "an odd address", "an odd stride", "an odd factor"],
)
def test_what_has_edges_or_odd_addresses_is_told(found: Kind) -> None:
    assert not found.whole
    assert found.whole_ranks


@pytest.mark.parametrize(
    ("rank", "depth", "deep", "whole"),
    [(4, 16, False, False), (16, 16, False, True), (20, 32, False, False), (32, 32, False, True), (48, 32, True, False),
     (128, 32, True, True)],
)  # fmt: skip
def test_few_kernels_serve_all_ranks(rank: int, depth: int, deep: bool, whole: bool) -> None:
    found = kind(64, 256, None, term(64, 256, rank))
    assert (found.depth, found.deep, found.whole_ranks) == (depth, deep, whole)


def test_terms_of_several_dtypes_become_alike_and_lose_nothing() -> None:
    mixed = [term(64, 256), term(64, 256, dtype=FP16)._replace(up=torch.full((64, 16), 0.1, dtype=FP16))]
    terms = alike(mixed)
    assert {t.up.dtype for t in terms} == {t.down.dtype for t in terms} == {FP32}
    assert torch.equal(terms[1].up, mixed[1].up.float())
    assert alike(mixed[:1])[0].up is mixed[0].up
    two_sides = Term(torch.zeros(64, 4), torch.zeros(4, 256, dtype=BF16), 1.0)
    assert alike([two_sides])[0].down.dtype is BF16


def test_a_row_of_the_table_says_where_everything_is() -> None:
    base, weight, scale = aligned(128, 256), aligned(128, 256, dtype=FP8), aligned(128, 1, dtype=FP32)
    mean, correction = aligned(256, dtype=FP32), aligned(128, dtype=FP32)
    terms = (term(64, 256), term(64, 256, 8))
    found = planned(Merge(64, 128, base, Fp8Place(weight, scale, mean, correction), terms))
    assert found.fields[:FIELDS] == [
        base.data_ptr() + 64 * 512, 256, weight.data_ptr() + 64 * 256, 256, scale.data_ptr() + 64 * 4, 1,
        mean.data_ptr(), correction.data_ptr() + 64 * 4, 64, 256, 0,
    ]  # fmt: skip
    assert len(found.fields) == FIELDS + 2 * TERM_FIELDS
    for number, (up, down, factor) in enumerate(terms):
        *places, bits = found.fields[FIELDS + number * TERM_FIELDS :][:TERM_FIELDS]
        assert places == [up.data_ptr(), down.data_ptr(), up.shape[1]]
        assert struct.unpack("f", struct.pack("i", bits))[0] == pytest.approx(factor)
    assert (found.kind.fp8, found.kind.with_mean, found.kind.count) == (True, True, 2)
    plain = planned(Merge(64, 128, base, Fp8Place(weight, scale), terms))
    assert plain.fields[6:8] == [0, 0]
    assert not plain.kind.with_mean


def test_no_kernels_tile_has_an_edge_where_there_is_said_to_be_none() -> None:
    """Such kernels have no masks: another size of a tile would write beyond a matrix."""
    triton_merge = pytest.importorskip("trt_core.triton_merge", exc_type=ImportError)
    base = aligned(64, 256)
    for rank, dtype, count in ((16, BF16, 1), (32, BF16, 1), (128, FP32, 1), (32, FP32, 8)):
        terms = tuple(term(64, 256, rank, dtype) for _ in range(count))
        scales = aligned(64, 1, dtype=FP32)
        for out in (base, Fp8Place(aligned(64, 256, dtype=FP8), scales)):
            constants = triton_merge._constants(planned(Merge(0, 64, base, out, terms)).kind)
            assert constants["WHOLE"]
            assert WHOLE_ROWS % constants["ROWS_BLOCK"] == 0
            assert WHOLE_WIDTH % constants["WIDTH_BLOCK"] == 0
