"""Which low-rank products go to which rows: carried out in plain PyTorch, the plan gives what the patches give."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import low_rank
from trt_core.lora.changes import (
    Change,
    Difference,
    Dora,
    DoraRule,
    Hadamard,
    LowRank,
    Patch,
    Replacement,
    SwappedHalves,
    merged,
)
from trt_core.low_rank import Section, low_rank_sections
from trt_core.low_rank_merge import Merges
from trt_core.merge_table import Fp8Place

CPU = torch.device("cpu")
ROWS, WIDTH = 96, 40
BASE = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
Rows = tuple[int, int] | None


def patch(rows: Rows, strength: float = 1.0, rank: int = 4, seed: int = 1) -> tuple[Patch, float]:
    start, stop = rows or (0, ROWS)
    change = low_rank((stop - start, WIDTH), rank, torch.Generator().manual_seed(seed), scale=0.3)
    return Patch("w", rows, change), strength


def planned(patches: Sequence[tuple[Patch, float]], shape: Sequence[int] = (ROWS, WIDTH)) -> list[Section]:
    sections = low_rank_sections(shape, patches, CPU)
    assert sections is not None
    return sections


def carried_out(sections: Sequence[Section]) -> Tensor:
    """NaN where no section writes."""
    out = torch.full_like(BASE, float("nan"))
    for start, stop, terms in sections:
        out[start:stop] = BASE[start:stop]
        for up, down, factor in terms:
            out[start:stop] += factor * (up.float() @ down.float())
    return out


def spans(sections: Sequence[Section]) -> list[tuple[int, int, int]]:
    return [(section.start, section.stop, len(section.terms)) for section in sections]


@pytest.mark.parametrize(
    "rows",
    [
        (None,),
        ((0, 32),),
        ((32, 64),),
        ((64, 96), (0, 32)),
        ((0, 32), (32, 64), (64, 96)),
        (None, None, None),
        (None, (32, 64)),
        ((0, 64), (32, 96)),
        ((16, 80), (32, 48), (40, 96), None),
        (),
    ],
)
def test_the_plan_is_the_sum_of_the_patches(rows: tuple[Rows, ...]) -> None:
    strengths = (1.0, -0.7, 0.3, 2.0)
    patches = [patch(part, strengths[index], rank=4 + index, seed=index) for index, part in enumerate(rows)]
    torch.testing.assert_close(carried_out(planned(patches)), merged(BASE, patches), rtol=1e-5, atol=1e-6)


def test_random_ranges() -> None:
    choices = random.Random(3)
    for _ in range(50):
        edges = [sorted(choices.sample(range(ROWS + 1), 2)) for _ in range(choices.randint(1, 6))]
        patches = [patch((a, b), choices.uniform(-1, 1), seed=index) for index, (a, b) in enumerate(edges)]
        sections = planned(patches)
        assert [section.start for section in sections[1:]] == [section.stop for section in sections[:-1]]
        torch.testing.assert_close(carried_out(sections), merged(BASE, patches), rtol=1e-5, atol=1e-6)


def test_rows_are_cut_where_a_patch_begins_or_ends_and_nowhere_else() -> None:
    assert spans(planned([patch(None)])) == [(0, 96, 1)]
    assert spans(planned([patch((32, 64))])) == [(0, 32, 0), (32, 64, 1), (64, 96, 0)]
    assert spans(planned([patch((0, 64)), patch((32, 96))])) == [(0, 32, 1), (32, 64, 2), (64, 96, 1)]
    assert spans(planned([])) == [(0, 96, 0)]


def test_terms_keep_the_order_of_the_patches() -> None:
    patches = [patch(part, 0.5, rank=rank) for rank, part in enumerate((None, (32, 64), None), start=1)]
    section = planned(patches)[1]
    assert [term.up.shape[1] for term in section.terms] == [1, 2, 3]


def test_nothing_comes_of_strength_or_scale_zero() -> None:
    """Not even a cut: these rows get the base's bits with their neighbours."""
    silent = LowRank(torch.ones(1, WIDTH), torch.ones(32, 1), scale=0.0)
    replaced = (Patch("w", None, Replacement(torch.zeros(ROWS, WIDTH))), 0.0)
    patches = [patch((32, 64), 0.0), (Patch("w", (0, 32), silent), 1.0), replaced]
    assert spans(planned(patches)) == [(0, 96, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_factors_keep_their_dtype_and_are_not_copied(dtype: torch.dtype) -> None:
    change = LowRank(torch.ones(4, WIDTH, dtype=dtype), torch.ones(64, 4, dtype=dtype), 0.5)
    sections = planned([(Patch("w", (0, 64), change), 2.0), patch((32, 96))])
    terms = [section.terms[0] for section in sections[:2]]
    assert [(term.up.dtype, term.down.dtype, term.factor) for term in terms] == [(dtype, dtype, 1.0)] * 2
    assert all(term.down.data_ptr() == change.down.data_ptr() for term in terms)
    assert [term.up.data_ptr() for term in terms] == [change.up.data_ptr(), change.up[32:].data_ptr()]


def test_kernels_get_contiguous_factors() -> None:
    change = LowRank(torch.randn(WIDTH, 4).t(), torch.randn(4, ROWS).t())
    patches = [(Patch("w", None, change), 1.0)]
    (section,) = planned(patches)
    assert all(factor.is_contiguous() for term in section.terms for factor in term[:2])
    torch.testing.assert_close(carried_out([section]), merged(BASE, patches), rtol=1e-5, atol=1e-6)


OTHERS = [
    Difference(torch.zeros(ROWS, WIDTH)),
    Replacement(torch.zeros(ROWS, WIDTH)),
    Hadamard(*(torch.ones(shape) for shape in ((ROWS, 2), (2, WIDTH)) * 2)),
    Dora(LowRank(torch.ones(1, WIDTH), torch.ones(ROWS, 1)), torch.ones(ROWS), DoraRule.PEFT),
    SwappedHalves(LowRank(torch.ones(1, WIDTH), torch.ones(ROWS, 1))),
]


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: type(change).__name__)
def test_other_changes_are_left_to_pytorch(change: Change) -> None:
    assert low_rank_sections((ROWS, WIDTH), [(Patch("w", None, change), 1.0)], CPU) is None
    assert low_rank_sections((ROWS, WIDTH), [patch((0, 32)), (Patch("w", None, change), 1.0)], CPU) is None


WRONG = {
    "too few rows": (None, LowRank(torch.ones(2, WIDTH), torch.ones(ROWS - 1, 2))),
    "too wide": (None, LowRank(torch.ones(2, WIDTH + 1), torch.ones(ROWS, 2))),
    "two ranks": (None, LowRank(torch.ones(2, WIDTH), torch.ones(ROWS, 3))),
    "rank 0": (None, LowRank(torch.ones(0, WIDTH), torch.ones(ROWS, 0))),
    "rows that are not there": ((64, 128), LowRank(torch.ones(2, WIDTH), torch.ones(64, 2))),
    "four axes": (None, LowRank(torch.ones(2, WIDTH, 1, 1), torch.ones(ROWS, 2, 1, 1))),
    "fp64": (None, LowRank(torch.ones(2, WIDTH).double(), torch.ones(ROWS, 2).double())),
    "fp8": (None, LowRank(torch.ones(2, WIDTH).to(torch.float8_e4m3fn), torch.ones(ROWS, 2))),
}


@pytest.mark.parametrize("name", WRONG)
def test_factors_that_a_kernel_would_read_wrongly_are_left_to_pytorch(name: str) -> None:
    rows, change = WRONG[name]
    assert low_rank_sections((ROWS, WIDTH), [(Patch("w", rows, change), 1.0)], CPU) is None


def test_a_bias_has_no_low_rank_change() -> None:
    assert low_rank_sections((ROWS,), [(Patch("b", None, Difference(torch.ones(ROWS))), 1.0)], CPU) is None


def test_on_the_cpu_pytorch_merges() -> None:
    """And nothing was written: ComfyUI's bits on the CPU are kept."""
    out = torch.full_like(BASE, float("nan"))
    merges = Merges(CPU)
    assert not merges.add(out, BASE, [patch(None)], lent=False)
    assert not merges.add_fp8(Fp8Place(out, out[:, :1]), BASE, [patch(None)], lent=False)
    merges.finish()
    assert out.isnan().all()


def test_a_plan_with_a_mistake_would_be_seen() -> None:
    """A dropped factor, shifted rows and a forgotten term each differ by more than the tests above allow."""
    patches = [patch((0, 64), 0.7), patch((32, 96), -0.5, seed=2)]
    good, expected = planned(patches), merged(BASE, patches)
    dropped = [s._replace(terms=tuple(t._replace(factor=1.0) for t in s.terms)) for s in good]
    shifted = [s._replace(terms=tuple(t._replace(up=t.up.roll(1, 0)) for t in s.terms)) for s in good]
    forgotten = [s._replace(terms=s.terms[:1]) for s in good]
    for wrong, right in itertools.product((dropped, shifted, forgotten), (expected,)):
        assert (carried_out(wrong) - right).abs().max() > 0.01
