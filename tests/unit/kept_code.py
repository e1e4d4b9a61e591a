"""A segment whose code is kept: `python -m tests.unit.kept_code FOLDER` is a new process that reads it and runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from trt_core.backends.base import Request
from trt_core.backends.inductor import InductorSegment
from trt_core.backends.inductor_code import KeptCode, code_key
from trt_core.config import Profile
from trt_core.engine_cache import EngineCache
from trt_core.flux.architecture import FluxArchitecture, scaled_axes
from trt_core.flux.attention import attend
from trt_core.flux.catalogue import SegmentName, segment

ARCH = FluxArchitecture(
    in_channels=64, out_channels=64, hidden=32, heads=2, mlp_hidden=128, double_depth=1, single_depth=1,
    context_dim=40, vec_dim=24, guidance=True, axes_dim=scaled_axes(16),
)  # fmt: skip
NAME = SegmentName.SINGLE_BLOCK
CPU = torch.device("cpu")
KEY = code_key({"segment": NAME.value})


def graphs() -> int:
    """Graphs that Dynamo has handed to Inductor so far in this process."""
    return counters["stats"]["unique_graphs"]


def inputs(batch: int = 1) -> list[Tensor]:
    torch.manual_seed(batch)
    return segment(NAME, ARCH, attend).random_inputs(batch, 24, 7, torch.float32, CPU)


def with_code_in(folder: Path, bound: float = 1.5) -> InductorSegment:
    """The segment, as a process makes it that finds `folder`."""
    described = segment(NAME, ARCH, attend)
    asked = Request(described, torch.float32, CPU, Profile.around(1, 24, 7), described.function)
    return InductorSegment(asked, KeptCode(EngineCache(folder), KEY, NAME.value, bound))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in unit tests, whose bits are compared with
    found = with_code_in(Path(sys.argv[1]))
    ratio = found.read()
    with torch.no_grad():
        sums = [float(out.double().sum()) for batch in (1, 2) for out in found(*inputs(batch))]
    sys.stdout.write(json.dumps({"ratio": ratio, "sums": sums, "graphs": graphs()}))
