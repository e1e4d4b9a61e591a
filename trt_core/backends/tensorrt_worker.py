"""A process of its own that builds engines: reads one JSON request per line, writes one JSON answer per line.

Why a process: importing torch_tensorrt and building hold Python's lock for many seconds, a build cannot be interrupted
from within, and a crash of the builder would take the artist's program with it. Killing this process cancels a build at
once and gives all of its memory back.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..config import Profile, ShapeRange
from ..errors import TRTError
from ..flux.architecture import FluxArchitecture
from ..flux.attention import attend
from ..flux.catalogue import SegmentName, segment
from ..flux.precision import Precision
from ..heap import give_back_heap
from . import tensorrt_fp8
from .base import Request
from .tensorrt import build_plan


def describe(request: Request, arch: FluxArchitecture) -> dict[str, Any]:
    """A request as JSON: everything that defines the engine, which is also what its cache key holds."""
    fields = {
        "segment": request.segment.name.value,
        "architecture": asdict(arch),
        "dtype": str(request.dtype).removeprefix("torch."),
        "profile": asdict(request.profile),
        # TensorRT's segments have attention of their own and multiply in FP8, whatever Inductor's may do.
        "precision": replace(request.precision, fp8_attention=False, wide=False).to_dict(),
    }
    return {**fields, "converters": tensorrt_fp8.source_version()} if request.precision.fp8 else fields


def parse(fields: dict[str, Any], device: torch.device) -> Request:
    arch = FluxArchitecture(**{**fields["architecture"], "axes_dim": tuple(fields["architecture"]["axes_dim"])})
    profile = Profile(**{axis: ShapeRange(**bounds) for axis, bounds in fields["profile"].items()})
    precision = Precision.from_dict(fields["precision"])
    built = segment(SegmentName(fields["segment"]), arch, attend, precision)
    return Request(built, getattr(torch, fields["dtype"]), device, profile, built.function, precision)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output; only answers may go there
    # torch_tensorrt imports ModelOpt where it finds it, which costs seconds, for the operations of ModelOpt's modules.
    # No segment has them: FP8 segments have converters of ours (`tensorrt_fp8`).
    sys.modules["modelopt"] = None  # type: ignore[assignment]
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()
        give_back_heap()  # what a build freed: measured on an H100, the next one starts 60 to 110 MB lower


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    device = torch.device("cuda", job["device"])
    try:
        plan = build_plan(parse(job["request"], device), job["timing_cache"])
    except TRTError as error:
        return {"id": job["id"], "error": type(error).__name__, "what": error.what, "fix": error.fix}
    Path(job["output"]).write_bytes(plan)
    return {"id": job["id"], "bytes": len(plan)}
