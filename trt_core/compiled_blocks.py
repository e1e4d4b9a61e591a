"""A plan with its compiled segments: how both kinds of block run, what that is called, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .backends.base import CompiledSegment
from .config import Backend, Layout
from .execution import DoubleBlock, SingleBlock, SplitDouble, SplitSingle, WholeDouble, WholeSingle
from .flux.attention import attention_function
from .flux.catalogue import BlockKind, SegmentName
from .flux.precision import Precision
from .plan import Plan

Segments = Mapping[tuple[SegmentName, Backend], CompiledSegment]


@dataclass(frozen=True, slots=True)
class CompiledBlocks:
    """What `PlanSearch` found and built, ready to run."""

    plan: Plan
    segments: Segments
    double: DoubleBlock
    single: SingleBlock

    @classmethod
    def of(cls, plan: Plan, segments: Segments) -> CompiledBlocks:
        return cls(plan, segments, _double(plan, segments), _single(plan, segments))

    @property
    def plan_bytes(self) -> int:
        """Size of TensorRT's plans in use; 0 where TensorRT runs nothing."""
        return sum(segment.plan_bytes for segment in self.segments.values())

    def words(self, precisions: Mapping[BlockKind, Precision]) -> dict[str, str]:
        """Segment name -> the backend that runs it, how its kind of block is cut, and FP8 where it is."""
        return {
            name.value: f"{backend.value} ({', '.join(filter(None, (self.plan.choice(kind).words(), fp8)))})"
            for kind, fp8 in ((kind, precisions[kind].words()) for kind in BlockKind)
            for name, backend in self.segments
            if name in self.plan.choice(kind).segments
        }

    def close(self) -> None:
        for segment in self.segments.values():
            segment.close()


def _double(plan: Plan, segments: Segments) -> DoubleBlock:
    parts = _parts(plan, BlockKind.DOUBLE, segments)
    if plan.double.layout is Layout.WHOLE:
        return WholeDouble(parts[0])
    return SplitDouble(*parts, attention_function(plan.double.attention))


def _single(plan: Plan, segments: Segments) -> SingleBlock:
    parts = _parts(plan, BlockKind.SINGLE, segments)
    if plan.single.layout is Layout.WHOLE:
        return WholeSingle(parts[0])
    return SplitSingle(*parts, attention_function(plan.single.attention))


def _parts(plan: Plan, kind: BlockKind, segments: Segments) -> list[CompiledSegment]:
    choice = plan.choice(kind)
    return [segments[name, backend] for name, backend in zip(choice.segments, choice.backends, strict=True)]
