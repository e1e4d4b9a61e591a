"""TensorRT's plans, built in processes of their own while this one compiles and measures other candidates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from .backends.compiler import SegmentCompiler
from .backends.tensorrt_builders import Builders
from .background import Stopwatch
from .errors import BuildFailed
from .flux.catalogue import SegmentName
from .host import stop_if_cancelled

_LOG = logging.getLogger("trt_core.plan")
_STAGE = "TensorRT builds"

Built = Mapping[SegmentName, bytes | BuildFailed]


def build_plans(
    compiler: SegmentCompiler, names: Sequence[SegmentName], processes: int, meanwhile: Callable[[], None]
) -> Built:
    """The plan of each segment, or why it could not be built; `meanwhile` runs while they are built.

    The processes start first, as importing Torch-TensorRT is a good part of their time, and have ended on return: their
    memory is free before engines are loaded. Plans are a few MB each. Raises `BuildCancelled` and `OutOfMemory`, and
    whatever `meanwhile` raises; no process is left then either.
    """
    if not names:
        meanwhile()
        return {}
    watch, processes = Stopwatch(), min(processes, len(names))
    with Builders(compiler.arch, compiler.device, processes, compiler.timing_cache()) as builders:
        tickets = {builders.submit(compiler.request(name)): name for name in _longest_first(names)}
        meanwhile()
        _wait(compiler, builders, list(tickets))
        built = {name: _outcome(builders, ticket) for ticket, name in tickets.items()}
    _LOG.info("TensorRT built %d engines in %d processes, %.1f s", len(names), processes, watch.seconds())
    return built


def _wait(compiler: SegmentCompiler, builders: Builders, tickets: list[int]) -> None:
    done = 0
    for ticket in builders.finished(tickets):
        stop_if_cancelled(compiler.progress, _STAGE)
        compiler.progress.update(_STAGE, done, len(tickets))
        done += ticket >= 0


def _outcome(builders: Builders, ticket: int) -> bytes | BuildFailed:
    try:
        return builders.result(ticket) or BuildFailed("The builder process returned nothing.")
    except BuildFailed as error:
        return error


def _longest_first(names: Iterable[SegmentName]) -> list[SegmentName]:
    """Double blocks take twice as long to build as single ones: they come first, so that two processes end together."""
    return sorted(names, key=lambda name: name.value)
