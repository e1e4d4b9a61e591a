"""Which backends can build a model's segments on this machine, and which segments a search builds first."""

from __future__ import annotations

from .backends.compiler import SegmentCompiler
from .backends.inductor import why_not_inductor
from .backends.tensorrt_fp8 import why_not_tensorrt_fp8
from .config import Backend, Layout
from .flux.catalogue import SPLIT_SEGMENTS, BlockKind, SegmentName
from .gpu import current_gpu, why_not_tensorrt
from .plan import WHOLE_SEGMENT


def why_not(compiler: SegmentCompiler) -> dict[Backend, str | None]:
    """Every backend and why it cannot be built on this machine for these precisions, or None."""
    return {
        Backend.TENSORRT: _why_not_tensorrt(compiler),
        Backend.INDUCTOR: why_not_inductor(compiler.device),
        Backend.EAGER: None,
    }


def halves() -> list[SegmentName]:
    return [name for kind in BlockKind for name in SPLIT_SEGMENTS[kind]]


def second_halves() -> list[SegmentName]:
    return [SPLIT_SEGMENTS[kind][1] for kind in BlockKind]


def first_segments(backend: Backend, layout: Layout | None) -> list[SegmentName]:
    """Segments to build first: halves for TensorRT and eager, whole blocks for Inductor.

    A `layout` of `SPLIT` leaves only halves.
    """
    if layout is Layout.SPLIT or backend is not Backend.INDUCTOR:
        return halves()
    return [WHOLE_SEGMENT[kind] for kind in BlockKind]


def _why_not_tensorrt(compiler: SegmentCompiler) -> str | None:
    gpu = current_gpu() if compiler.device.type == "cuda" else None
    precisions = (compiler.precision(WHOLE_SEGMENT[kind]) for kind in BlockKind)
    return why_not_tensorrt(gpu) or next(filter(None, (why_not_tensorrt_fp8(p, gpu) for p in precisions)), None)
