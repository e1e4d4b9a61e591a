"""`python -m benchmarks.growth`: how the cost of a step and of a LoRA switch grows; one JSON line per point.

One process, one compiled model per precision, the points that say most first. A point that this run's file already has
is left out, so that a run which --limit stopped goes on where it was. Base weights are on the GPU: while LoRAs are
switched, it holds the model twice in bf16; while steps are measured, once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trt_core.config import Profile, ShapeRange, image_tokens
from trt_core.errors import OutOfMemory
from trt_core.measure import median_milliseconds

from . import model as models
from .fp8_budget import seconds
from .fp8_calls import call
from .fp8_lines import TINY, Line, append, device_of
from .lines import RESULTS, read
from .run import machine

REPEATS, SWITCHES = 5, 4
PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True, slots=True)
class Step:
    """A square picture, `text_tokens` and `batch` of one step."""

    height_px: int = 1024
    text_tokens: int = 512
    batch: int = 1

    def fields(self) -> Line:
        return {"kind": "step", **asdict(self), "width_px": self.height_px}

    def tiny(self) -> Step:
        """The same in the proportions of a small model."""
        return Step(self.height_px // 16, self.text_tokens // 32, self.batch)


@dataclass(frozen=True, slots=True)
class Switch:
    """From `loras` LoRAs of this rank to others, on every matrix of every block."""

    lora_rank: int
    loras: int = 1

    def fields(self) -> Line:
        return {"kind": "lora", **asdict(self)}

    def tiny(self) -> Switch:
        return self


Point = Step | Switch
BASE = Step()
POINTS: tuple[Point, ...] = (
    BASE, Step(2048), Step(512), Step(1024, 256),
    Switch(16), Switch(16, 8), Switch(128), Switch(4),
    Step(1536), Step(768), Step(batch=2), Step(batch=4), Step(batch=8),
    Switch(64), Switch(32), Switch(16, 4), Switch(16, 2),
    Step(2048, 256), Step(512, 256), Step(1536, 256), Step(768, 256),
)  # fmt: skip
"""Wherever `--limit` cuts, the ends of each kind come before what lies between them. Neighbours of one rank share their
adapters, whose making costs seconds, and no step comes between."""


# -- one point ---------------------------------------------------------------------------------------------------------


class Grown:
    """One compiled model, measured point by point; LoRAs are switched between steps of size `base`."""

    def __init__(self, ours: Any, device: torch.device, base: Step) -> None:
        self._ours, self._device, self._base = ours, device, base
        self._rank = 0
        self._names: list[str] = []

    def measure(self, point: Point) -> Line:
        """The point with what was measured, or with the reason why it was `skipped`."""
        measured = fitting(lambda: self._step(point) if isinstance(point, Step) else self._switch(point))
        if "skipped" in measured:
            self._free()
        return {**point.fields(), **measured}

    def _step(self, point: Step) -> Line:
        self._without_loras()
        run = self._run(point)
        line = {"first_call_seconds": seconds(run, self._device)}
        before = self._allocated()  # after it: the first call of all binds the weights
        if before is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        line["step_ms"] = median_milliseconds(run, self._device, REPEATS, warmup=1)
        if before is not None:
            line["bytes_above_weights"] = torch.cuda.max_memory_allocated(self._device) - before
        return line

    def _switch(self, point: Switch) -> Line:
        """Between the first `loras` adapters and the last: the next step's time above a plain step, and the refit."""
        layers = self._with_loras(point.lora_rank, point.loras + 1)
        run, switches, refits = self._run(self._base), [], []
        sets = (self._names[: point.loras], self._names[1 : point.loras + 1])
        self._ours.set_adapters(sets[0])
        run()
        plain = min(seconds(run, self._device) for _ in range(3))
        for index in range(SWITCHES):
            self._ours.set_adapters(sets[(index + 1) % 2])
            switches.append(seconds(run, self._device) - plain)
            refits.append(self._ours.trt_report().last_refit)
        refit_ms = sorted(refit.milliseconds for refit in refits)[SWITCHES // 2]
        switch_ms = sorted(switches)[SWITCHES // 2] * 1000
        return {"lora_layers": layers, "merged": refits[-1].merged, "lora_refit_ms": refit_ms,
                "lora_switch_ms": switch_ms}  # fmt: skip

    def _run(self, step: Step) -> Callable[[], Any]:
        arguments = models.inputs(self._ours, step.batch, step.height_px, step.height_px, step.text_tokens)
        return lambda: call(self._ours, arguments)

    def _with_loras(self, rank: int, number: int) -> int:
        """Adapters of `rank`, at least `number` of them: those that there are stay. How many layers they have."""
        if rank != self._rank:
            self._without_loras()
        new = tuple(f"lora_{index}" for index in range(len(self._names), number))
        self._rank, self._names = rank, [*self._names, *new]
        return models.add_loras(self._ours, rank, new)

    def _without_loras(self) -> None:
        if self._names:
            self._ours.delete_adapters(self._names)
            self._names = []
            self._run(self._base)()  # restores the base now, not in what is measured next

    def _allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def fitting(work: Callable[[], Line]) -> Line:
    """What `work` measured, or why it was skipped: it does not fit into the GPU's memory."""
    try:
        return work()
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        return {"skipped": str(error).strip().splitlines()[0]}


# -- the run -----------------------------------------------------------------------------------------------------------


def points_of(tiny: bool) -> list[Point]:
    return [point.tiny() if tiny else point for point in POINTS]


def shapes() -> Profile:
    """Every size that is measured, tuned for the first: no point builds engines anew."""
    steps = [point for point in POINTS if isinstance(point, Step)]
    tokens = [image_tokens(step.height_px, step.height_px) for step in steps]
    texts, batches = [step.text_tokens for step in steps], [step.batch for step in steps]
    return Profile(
        ShapeRange(min(tokens), tokens[0], max(tokens)),
        ShapeRange(min(texts), texts[0], max(texts)),
        ShapeRange(min(batches), batches[0], max(batches)),
    )


def measure(
    device: torch.device, precision: str, points: Sequence[Point], deadline: float, options: dict[str, Any], tiny: bool
) -> Iterator[Line]:
    """Lines until `deadline` (of `time.perf_counter`); `options` go to `compile_transformer`."""
    import trt_core

    if not points:
        return
    model = models.full_size_transformer(device, **(TINY if tiny else {}))
    if precision == "fp8":
        trt_core.quantize_fp8_(model)
    profile = None if tiny else shapes()
    ours: Any = trt_core.compile_transformer(model, base_weights="gpu", profile=profile, **options)
    grown = Grown(ours, device, BASE.tiny() if tiny else BASE)
    for done, point in enumerate(points):
        if (started := time.perf_counter()) > deadline:
            sys.stderr.write(f"--limit: {len(points) - done} points of {precision} are left for another run\n")
            break
        measured = {**grown.measure(point), **({} if done else {"first_of_process": True})}
        yield {"precision": precision, **measured, "point_seconds": time.perf_counter() - started}
    trt_core.restore_transformer(ours)


def missing(points: Sequence[Point], lines: Sequence[Line], **same: str) -> list[Point]:
    """The points of which no line has these fields, such as the run's name."""
    known = [line for line in lines if _holds(line, same)]
    return [point for point in points if not any(_holds(line, point.fields()) for line in known)]


def _holds(line: Line, fields: Line) -> bool:
    return all(line.get(name) == value for name, value in fields.items())


def read_all(folder: Path | None) -> list[Line]:
    return [line for path in sorted(folder.glob("*.jsonl")) for line in read(path)] if folder is not None else []


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds, shared evenly by the precisions")
    parser.add_argument("--cache", help="folder of compiled engines; the library's own by default")
    parser.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/growth; with --tiny, none")
    parser.add_argument("--tiny", action="store_true", help="a small model on whatever device there is, as a self-test")
    args = parser.parse_args(argv)
    started, device, about = time.perf_counter(), device_of(args.tiny), machine()
    folder = args.results or (None if args.tiny else RESULTS / "growth")
    lines, options = read_all(folder), {"backend": args.backend, "cache_folder": args.cache}
    for place, precision in enumerate(args.precision, start=1):
        points = missing(points_of(args.tiny), lines, run=args.run, precision=precision, gpu=about["gpu"])
        deadline = started + args.limit * place / len(args.precision)
        for measured in measure(device, precision, points, deadline, options, args.tiny):
            line = {"run": args.run, **({"tiny": True} if args.tiny else {}), "backend": args.backend, **measured}
            if folder is not None:
                append(folder, [line], about)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
