"""The plan: chosen from measurements, written as JSON, said in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from trt_core.config import Attention, Backend, Layout, Profile
from trt_core.errors import BuildFailed
from trt_core.flux.catalogue import SPLIT_SEGMENTS, SegmentName
from trt_core.flux.cublaslt_kernels import Kernel
from trt_core.flux.products import Product
from trt_core.plan import (
    AttentionChoice,
    BlockChoice,
    BlockKind,
    KernelChoice,
    Measurement,
    Plan,
    choose,
    left_out,
    summary,
    why_not_inductor_half,
    why_not_second_half,
    why_not_whole_tensorrt,
)

TRT, IND, EAGER = Backend.TENSORRT, Backend.INDUCTOR, Backend.EAGER
QKV, OUT, WHOLE = SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT, SegmentName.DOUBLE_BLOCK
SINGLE_QKV, SINGLE_OUT = SegmentName.SINGLE_QKV_MLP, SegmentName.SINGLE_OUT
SINGLE_WHOLE = SegmentName.SINGLE_BLOCK
ATTENTION_MS = 0.5

Measured = Mapping[tuple[SegmentName, Backend], float]


def double(measured: Measured) -> tuple[BlockChoice, float]:
    return choose(BlockKind.DOUBLE, measured, AttentionChoice(Attention.CUDNN, ATTENTION_MS))


def split(*backends: Backend, kind: BlockKind = BlockKind.DOUBLE) -> BlockChoice:
    return BlockChoice(kind, Layout.SPLIT, backends, Attention.CUDNN)


def whole(backend: Backend, kind: BlockKind = BlockKind.DOUBLE) -> BlockChoice:
    return BlockChoice(kind, Layout.WHOLE, (backend,), Attention.CUDNN)


def test_each_half_takes_its_fastest_backend() -> None:
    measured = {(QKV, TRT): 1.0, (QKV, IND): 1.2, (OUT, TRT): 2.5, (OUT, IND): 2.0, (WHOLE, IND): 3.6}
    choice, ms = double(measured)
    assert choice == split(TRT, IND)
    assert ms == pytest.approx(1.0 + ATTENTION_MS + 2.0)


def test_a_whole_block_wins_by_attentions_time() -> None:
    measured = {(QKV, IND): 1.0, (OUT, IND): 2.0, (WHOLE, IND): 3.4}
    assert double(measured) == (whole(IND), 3.4)
    assert double({**measured, (WHOLE, IND): 3.6})[0] == split(IND, IND)


def test_the_fastest_whole_block_wins() -> None:
    assert double({(WHOLE, IND): 3.0, (WHOLE, TRT): 2.9, (WHOLE, EAGER): 9.0}) == (whole(TRT), 2.9)


def test_half_a_split_block_is_none() -> None:
    assert double({(QKV, TRT): 0.1, (WHOLE, IND): 5.0})[0] == whole(IND)


def test_other_kinds_of_block_do_not_count() -> None:
    measured = {(SINGLE_QKV, TRT): 0.1, (SINGLE_OUT, TRT): 0.1, (QKV, EAGER): 4.0, (OUT, EAGER): 4.0}
    assert double(measured) == (split(EAGER, EAGER), 8.0 + ATTENTION_MS)


def test_nothing_measured_is_an_error_that_says_what_to_use() -> None:
    with pytest.raises(BuildFailed, match=r'No candidate for the single block.*backend="eager"'):
        choose(BlockKind.SINGLE, {(QKV, TRT): 1.0, (OUT, TRT): 1.0}, AttentionChoice(Attention.FLASH, 0.1))


def test_a_whole_tensorrt_block_is_built_only_where_it_can_win() -> None:
    halves = {(QKV, TRT): 1.5, (OUT, TRT): 2.0}
    reason = why_not_whole_tensorrt(BlockKind.DOUBLE, halves, best_ms=3.4)
    assert reason == "its halves take 3.50 ms without attention, the best whole block 3.40 ms"
    assert why_not_whole_tensorrt(BlockKind.DOUBLE, halves, best_ms=3.5) is None
    assert why_not_whole_tensorrt(BlockKind.DOUBLE, {(QKV, TRT): 9.0, (OUT, IND): 1.0}, best_ms=0.1) is None
    assert why_not_whole_tensorrt(BlockKind.SINGLE, halves, best_ms=0.1) is None


def test_a_whole_tensorrt_block_is_not_built_where_its_second_half_cannot_win() -> None:
    def why_not(kind: BlockKind) -> str | None:
        return why_not_whole_tensorrt(kind, {(QKV, TRT): 0.1}, best_ms=9.0, hopeless={OUT})

    assert why_not(BlockKind.DOUBLE) == "it does the work of double_out, too, which is left out"
    assert why_not(BlockKind.SINGLE) is None


@pytest.mark.parametrize(
    ("times", "slowness", "least"),
    [
        ((1.11, 0.45, 0.95, 1.857, 0.375), "2.5", "2.58"),
        ((1.99, 0.90, 0.55, 1.806, 0.375), "2.2", "2.19"),
        ((0.94, 0.21, 0.44, 1.278, 0.40), "4.5", "2.09"),
    ],
    ids=["bf16 double", "bf16 single", "fp8 double"],
)
def test_on_an_h100_tensorrts_second_halves_cannot_win(times: tuple[float, ...], slowness: str, least: str) -> None:
    assert why_not_second_half(*times) == (
        f"TensorRT's first half takes {slowness} times its matrix products: a block with its second half is expected "
        f"to take {least} ms or more, the best block {times[3]:.2f} ms"
    )


def test_a_second_half_may_win_where_the_first_is_hardly_slower_than_its_products() -> None:
    assert why_not_second_half(0.5, 0.45, 0.95, 1.857, 0.375) is None, "0.79 ms, where 1.03 ms are left"


def test_a_second_half_is_left_out_from_where_it_only_equals_the_best_block() -> None:
    """Sums that have no rounding: 0.75 * (2 / 1) * 1 + 1 + 0.5."""
    assert why_not_second_half(2.0, 1.0, 1.0, 3.0, 0.5) is not None
    assert why_not_second_half(2.0, 1.0, 1.0, 3.001, 0.5) is None


def test_a_first_half_may_be_faster_than_its_products() -> None:
    """0.5, not 1, beside 0.75 * (0.5 / 1) * 4 and 0.5 for attention."""
    assert why_not_second_half(0.5, 1.0, 4.0, 2.5, 0.5) is not None
    assert why_not_second_half(0.5, 1.0, 4.0, 2.6, 0.5) is None


def test_without_products_of_the_first_half_nothing_is_expected_of_the_second() -> None:
    assert why_not_second_half(9.0, 0.0, 1.0, 0.1, 0.1) is None


# Measured on an H100, in ms: what Inductor's halves take is what the search need not find out.
H100 = {
    (WHOLE, IND): 2.042, (QKV, TRT): 1.111, (OUT, TRT): 1.960, (QKV, EAGER): 1.606, (OUT, EAGER): 1.357,
    (SINGLE_WHOLE, IND): 1.891, (SINGLE_QKV, TRT): 1.978, (SINGLE_OUT, TRT): 1.205,
    (SINGLE_QKV, EAGER): 1.868, (SINGLE_OUT, EAGER): 0.859,
}  # fmt: skip
H100_INDUCTOR_HALVES = {(QKV, IND): 0.489, (OUT, IND): 1.209, (SINGLE_QKV, IND): 0.850, (SINGLE_OUT, IND): 0.656}
H100_ATTENTION = AttentionChoice(Attention.CUDNN, 0.403)


def why_not_half(name: SegmentName, measured: Measured = H100, products_ms: float = 0.0) -> str | None:
    best_ms = choose(name.kind, measured, H100_ATTENTION)[1]
    return why_not_inductor_half(name, measured, best_ms, H100_ATTENTION.between_ms, products_ms)


def test_where_eager_beats_tensorrts_half_no_mix_can_win() -> None:
    assert why_not_half(SINGLE_OUT) == "TensorRT's single_qkv_mlp beside it takes 1.98 ms, eager's 1.87 ms"
    assert why_not_half(SINGLE_QKV) == "TensorRT's single_out beside it takes 1.21 ms, eager's 0.86 ms"
    assert why_not_half(QKV) == "TensorRT's double_out beside it takes 1.96 ms, eager's 1.36 ms"


def test_a_half_that_may_win_is_compiled_unless_its_products_alone_take_too_long() -> None:
    assert why_not_half(OUT) is None, "1.11 and attention leave 0.53 ms"
    assert why_not_half(OUT, products_ms=0.5) is None
    assert why_not_half(OUT, products_ms=1.1) == (
        "with TensorRT's double_qkv and attention it takes 2.61 ms or more, the best block 2.04 ms"
    )


def test_a_tensorrt_half_that_is_slower_than_the_best_block_helps_no_mix() -> None:
    measured = {(WHOLE, IND): 1.0, (QKV, TRT): 0.7, (OUT, TRT): 0.4, (QKV, EAGER): 2.0, (OUT, EAGER): 2.0}
    assert why_not_half(OUT, measured) == (
        "with TensorRT's double_qkv and attention it takes 1.10 ms or more, the best block 1.00 ms"
    )
    assert why_not_half(QKV, measured) is None


def test_without_tensorrts_other_half_there_is_no_mix() -> None:
    assert why_not_half(QKV, {(WHOLE, IND): 1.0}) == "TensorRT has no double_out to run beside it"


def test_without_inductors_whole_block_its_halves_are_candidates() -> None:
    measured = {key: ms for key, ms in H100.items() if key != (WHOLE, IND)}
    assert why_not_half(QKV, measured) is None
    assert why_not_half(OUT, measured) is None
    assert why_not_half(SINGLE_OUT, measured) is not None, "another kind of block"


def test_what_is_left_out_would_not_have_been_chosen() -> None:
    for kind, products in ((BlockKind.DOUBLE, {OUT: 1.1}), (BlockKind.SINGLE, {})):
        seen = choose(kind, H100, H100_ATTENTION)
        for name in SPLIT_SEGMENTS[kind]:
            assert why_not_half(name, products_ms=products.get(name, 0.0))
        assert choose(kind, {**H100, **H100_INDUCTOR_HALVES}, H100_ATTENTION) == seen


def test_a_choice_knows_its_segments() -> None:
    assert split(TRT, IND).segments == (QKV, OUT)
    assert whole(TRT, BlockKind.SINGLE).segments == (SegmentName.SINGLE_BLOCK,)


@pytest.mark.parametrize(
    ("layout", "backends"), [(Layout.SPLIT, (TRT,)), (Layout.WHOLE, (TRT, IND)), (Layout.WHOLE, ())]
)
def test_a_choice_needs_a_backend_for_each_segment(layout: Layout, backends: tuple[Backend, ...]) -> None:
    with pytest.raises(ValueError, match="segments, not"):
        BlockChoice(BlockKind.DOUBLE, layout, backends, Attention.AUTO)


def test_words() -> None:
    assert split(TRT, IND).words() == "split tensorrt + inductor, cudnn attention"
    assert whole(IND).words() == "whole inductor, cudnn attention"
    assert whole(TRT).words() == "whole tensorrt, TensorRT attention"


def a_plan(double: BlockChoice | None = None) -> Plan:
    return Plan(
        double or split(TRT, IND),
        whole(IND, BlockKind.SINGLE),
        Profile.around(2, 4096, 512),
        (
            Measurement("attention", "cudnn", 0.7),
            Measurement("double_qkv", "tensorrt", 1.25, 0.98),
            Measurement("single_block", "tensorrt", left_out="it cannot win"),
        ),
        (KernelChoice(Product(4608, 12288, 3072, gelu=True), Kernel("128x160", "2x1", 1)),),
    )


def test_needed_segments() -> None:
    assert a_plan().needed() == [
        (QKV, TRT, Attention.CUDNN),
        (OUT, IND, Attention.CUDNN),
        (SegmentName.SINGLE_BLOCK, IND, Attention.CUDNN),
    ]


def test_only_tensorrt_is_bound_to_a_profile() -> None:
    assert a_plan().uses_profile
    assert not a_plan(split(IND, EAGER)).uses_profile


def test_json_there_and_back() -> None:
    plan = a_plan()
    written = plan.to_json()
    assert Plan.from_json(written) == plan
    assert json.loads(written)["double"]["backends"] == ["tensorrt", "inductor"], "a person can read it"


def _without(name: str) -> Any:
    return lambda fields: fields.pop(name)


def _set(*path: Any) -> Any:
    def change(fields: Any) -> None:
        for step in path[:-2]:
            fields = fields[step]
        fields[path[-2]] = path[-1]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _without("double"),
        _without("profile"),
        _without("measurements"),
        _set("double", "backends", 0, "quantum"),
        _set("double", "backends", ["tensorrt"]),
        _set("double", "layout", "thirds"),
        _set("single", "attention", "none"),
        _set("single", "kind", "triple"),
        _set("profile", "img_tokens", {"min": 1, "opt": 2}),
        _set("profile", "colour", {"min": 1, "opt": 2, "max": 3}),
        _set("profile", 7),
        _set("measurements", [{"seen": 1}]),
    ],
)
def test_json_of_another_kind_is_refused(damage: Any) -> None:
    fields = json.loads(a_plan().to_json())
    damage(fields)
    with pytest.raises((ValueError, KeyError, TypeError)):
        Plan.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("data", [b"", b"not json", b"[]", b"null", b"7", b"\xff\xfe"])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Plan.from_json(data)


def test_summary_is_one_line_with_the_time_of_a_step() -> None:
    times = {BlockKind.DOUBLE: 2.0, BlockKind.SINGLE: 1.0}
    line = summary(a_plan(), times, {BlockKind.DOUBLE: 19, BlockKind.SINGLE: 38})
    assert line == (
        "double: split tensorrt + inductor, cudnn attention, 2.00 ms; "
        "single: whole inductor, cudnn attention, 1.00 ms; 76.0 ms per step"
    )


def test_summary_of_what_was_not_measured_has_no_times() -> None:
    line = summary(a_plan(), dict.fromkeys(BlockKind, 0.0), dict.fromkeys(BlockKind, 19))
    assert " ms" not in line
    assert "split tensorrt + inductor" in line


def test_left_out_measurements_are_found() -> None:
    assert [m.left_out for m in left_out(a_plan().measurements)] == ["it cannot win"]


def test_fp8_attention_is_inside_inductors_whole_blocks_only() -> None:
    attention = AttentionChoice(Attention.CUDNN, 0.4, {BlockKind.DOUBLE: Attention.FP8})
    whole = {(SegmentName.DOUBLE_BLOCK, Backend.INDUCTOR): 1.0, (SegmentName.DOUBLE_BLOCK, Backend.TENSORRT): 2.0}
    assert choose(BlockKind.DOUBLE, whole, attention)[0].attention is Attention.FP8
    assert "fp8 attention" in choose(BlockKind.DOUBLE, whole, attention)[0].words()
    by_tensorrt = {**whole, (SegmentName.DOUBLE_BLOCK, Backend.TENSORRT): 0.5}
    assert choose(BlockKind.DOUBLE, by_tensorrt, attention)[0].attention is Attention.CUDNN
    halves = {(name, Backend.INDUCTOR): 0.1 for name in SPLIT_SEGMENTS[BlockKind.DOUBLE]}
    assert choose(BlockKind.DOUBLE, {**whole, **halves}, attention)[0].attention is Attention.CUDNN
    without = attention.without(BlockKind.DOUBLE)
    assert choose(BlockKind.DOUBLE, whole, without)[0].attention is Attention.CUDNN


def test_products_that_are_not_fp8_are_said_and_remembered() -> None:
    attention = AttentionChoice(Attention.CUDNN, 0.4)
    by_inductor, by_tensorrt = {(WHOLE, IND): 1.0}, {(WHOLE, TRT): 1.0}
    choice, _ = choose(BlockKind.DOUBLE, by_inductor, attention, {BlockKind.DOUBLE})
    assert choice.wide
    assert choice.words() == "whole inductor, cudnn attention, products not in fp8"
    assert not choose(BlockKind.DOUBLE, by_inductor, attention, {BlockKind.SINGLE})[0].wide
    assert not choose(BlockKind.DOUBLE, by_tensorrt, attention, {BlockKind.DOUBLE})[0].wide, "TensorRT's are its own"
    single = BlockChoice(BlockKind.SINGLE, Layout.WHOLE, (IND,), Attention.CUDNN)
    plan = Plan(choice, single, Profile.around(1, 64, 8))
    assert Plan.from_json(plan.to_json()) == plan
    without = json.loads(plan.to_json())
    del without["double"]["wide"]
    with pytest.raises(KeyError):
        Plan.from_json(json.dumps(without).encode())
