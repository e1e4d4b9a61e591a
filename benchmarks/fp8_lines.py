"""What the FP8 measurements share: their options, their lines in `results/fp8`, and a small model to try them on."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .lines import RESULTS, Line, file_name
from .lines import append as append_line
from .run import machine

TINY = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64, "num_attention_heads": 4,
    "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
TINY_PX, TINY_TEXT_TOKENS = 64, 8


def append(folder: Path, lines: Sequence[Line], about: Line) -> Path:
    """Adds lines to the file of this GPU."""
    path = folder / file_name(about["gpu"])
    for line in lines:
        append_line(path, {**line, **about})
    return path


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that both FP8 measurements have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    made.add_argument("--results", type=Path, help="default: benchmarks/results/fp8; with --tiny lines are only shown")
    made.add_argument("--backend", default="auto")
    made.add_argument("--cache", help="folder of compiled engines; the library's own by default")
    made.add_argument("--tiny", action="store_true", help="a small model on whatever device there is, as a self-test")
    return made


def write(args: argparse.Namespace, lines: Iterator[Line]) -> None:
    """Shows each line and appends it at once: what was measured is kept when something later fails."""
    about = machine()
    folder = args.results or (None if args.tiny else RESULTS / "fp8")
    started = time.perf_counter()
    for line in lines:
        line = {"run": args.run, **({"tiny": True} if args.tiny else {}), **line}
        if folder is not None:
            append(folder, [line], about)
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        sys.stderr.write(f"{line['kind']}: {time.perf_counter() - started:.0f} s since the start\n")


def device_of(tiny: bool) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not tiny:
        raise SystemExit("There is no GPU here. --tiny runs a small model on the CPU.")
    return torch.device("cpu")
