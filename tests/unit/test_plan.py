"""The plan: chosen from measurements, written as JSON, said in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from trt_core.config import Attention, Backend, Layout, Profile
from trt_core.errors import BuildFailed
from trt_core.flux.catalogue import SegmentName
from trt_core.plan import (
    BlockChoice,
    BlockKind,
    Measurement,
    Plan,
    choose,
    left_out,
    summary,
    why_not_whole_tensorrt,
)

TRT, IND, EAGER = Backend.TENSORRT, Backend.INDUCTOR, Backend.EAGER
QKV, OUT, WHOLE = SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT, SegmentName.DOUBLE_BLOCK
SINGLE_QKV, SINGLE_OUT = SegmentName.SINGLE_QKV_MLP, SegmentName.SINGLE_OUT
ATTENTION_MS = 0.5

Measured = Mapping[tuple[SegmentName, Backend], float]


def double(measured: Measured) -> tuple[BlockChoice, float]:
    return choose(BlockKind.DOUBLE, measured, Attention.CUDNN, ATTENTION_MS)


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
        choose(BlockKind.SINGLE, {(QKV, TRT): 1.0, (OUT, TRT): 1.0}, Attention.FLASH, 0.1)


def test_a_whole_tensorrt_block_is_built_only_where_it_can_win() -> None:
    halves = {(QKV, TRT): 1.5, (OUT, TRT): 2.0}
    reason = why_not_whole_tensorrt(BlockKind.DOUBLE, halves, best_ms=3.4)
    assert reason == "its halves take 3.50 ms without attention, the best whole block 3.40 ms"
    assert why_not_whole_tensorrt(BlockKind.DOUBLE, halves, best_ms=3.5) is None
    assert why_not_whole_tensorrt(BlockKind.DOUBLE, {(QKV, TRT): 9.0, (OUT, IND): 1.0}, best_ms=0.1) is None
    assert why_not_whole_tensorrt(BlockKind.SINGLE, halves, best_ms=0.1) is None


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
