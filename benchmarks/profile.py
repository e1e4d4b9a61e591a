"""`python -m benchmarks.profile`: where one step of the compiled transformer spends its time, kernel by kernel.

A step is one of a picture's (`pictures`), averaged over all of them. Kernels are grouped by what they are for
(`kernels`), beside the least time that this work can take on this GPU. The
step's wall time is measured without the profiler; the GPU idles where no kernel runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trt_core.config import image_tokens
from trt_core.flux.architecture import FluxArchitecture

from . import model as models
from .fp8_budget import wait
from .fp8_calls import call
from .fp8_lines import TINY, TINY_PX, TINY_TEXT_TOKENS, Line, append, device_of
from .kernels import PEAKS, Call, Kind, floors, kind_of, totals
from .lines import RESULTS
from .pictures import Pictures, pipeline
from .report import profile_rows, profile_title
from .run import machine

_NAME_LENGTH = 60
_MOST_PAIRS = 30


class Kernel(NamedTuple):
    """One launch. `own_us` is its duration; for a CPU's operator, without those it calls."""

    name: str
    start_us: float
    end_us: float
    own_us: float


def recorded(run: Callable[[], object], device: torch.device, steps: int) -> list[Kernel]:
    """What ran on the device (on a CPU: PyTorch's operators), in order of its start."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            run()
        wait(device)
    place = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [e for e in seen.events() if e.device_type == place and not getattr(e, "is_user_annotation", False)]
    if not events:
        raise SystemExit("The profiler saw nothing run. Is another profiler using this GPU?")
    kernels = [
        Kernel(
            e.name, e.time_range.start, e.time_range.end, e.time_range.elapsed_us() if gpu else e.self_cpu_time_total
        )
        for e in events
    ]
    return sorted(kernels, key=lambda kernel: kernel.start_us)


def busy_us(kernels: Iterable[Kernel]) -> float:
    """How long at least one kernel ran; they may overlap."""
    total, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_us):
        total += max(0.0, kernel.end_us - max(end, kernel.start_us))
        end = max(end, kernel.end_us)
    return total


def summary(kernels: Sequence[Kernel], steps: int, step_ms: float, floor: dict[Kind, float]) -> Line:
    """Numbers of one step: each kind's time, its share of the step and its floor, the longest kind first."""
    per_step = 1e-3 / steps
    kinds, others = totals((kernel.name, kernel.own_us * per_step) for kernel in kernels)
    busy_ms = busy_us(kernels) * per_step
    line: Line = {
        "step_ms": step_ms,
        "profiled_step_ms": (max(k.end_us for k in kernels) - min(k.start_us for k in kernels)) * per_step,
        "kernel_ms": sum(total.ms for total in kinds.values()),
        "busy_ms": busy_ms,
        "idle_share": max(0.0, 1 - busy_ms / step_ms),
        "classes": {},
    }
    for kind, total in sorted(kinds.items(), key=lambda item: -item[1].ms):
        known = {"floor_ms": floor[kind]} if kind in floor else {}
        share = total.ms / step_ms
        line["classes"][kind.value] = {"ms": total.ms, "launches": total.launches / steps, "share": share, **known}
    if floor:
        line["floor_ms"] = sum(floor.values())
    line["other"] = dict(sorted(others.items(), key=lambda item: -item[1]))
    line["copies_before"] = copies_before(kernels, steps)
    return line


def copies_before(kernels: Sequence[Kernel], steps: int) -> dict[str, float]:
    """Whose copies and memsets they are: launches in a step by "copy -> the next kernel that is none", the most first.

    Products and attention bring memsets of their own, a microsecond each with its launch: which ones, cannot be seen in
    a sum over all.
    """
    found: Counter[str] = Counter()
    waiting: list[str] = []
    for kernel in kernels:
        if kind_of(kernel.name) is Kind.COPY:
            waiting.append(kernel.name)
            continue
        found.update(f"{name[:_NAME_LENGTH]} -> {kernel.name[:_NAME_LENGTH]}" for name in waiting)
        waiting.clear()
    return {pair: count / steps for pair, count in found.most_common(_MOST_PAIRS)}


def measure(
    device: torch.device, precision: str, sizes: tuple[int, int, int], options: dict[str, Any], changes: dict[str, Any],
    gpu: str,
) -> Line:  # fmt: skip
    """One line. `sizes`: side in px, text tokens, batch; `options` go to `compile_transformer`, `changes` to the
    model's config; `gpu` names the one whose peaks are the floor."""
    import trt_core

    px, text_tokens, batch = sizes
    model = models.full_size_transformer(device, **changes)
    if precision == "fp8":
        trt_core.quantize_fp8_(model)
    pipe = pipeline(model)
    ours: Any = trt_core.compile_transformer(pipe, **options)
    arguments = models.inputs(ours, batch, px, px, text_tokens)
    call(ours, arguments)
    pictures = Pictures(pipe, ours, arguments)
    step_ms = pictures.step_ms(device)
    recorded(lambda: call(ours, arguments), device, 1)  # the profiler's own first start
    arch = FluxArchitecture.from_diffusers_config(ours.config)
    floor = floors(arch, Call(batch, image_tokens(px, px), text_tokens, precision == "fp8"), gpu)
    line = summary(recorded(pictures, device, 1), pictures.steps, step_ms, floor)
    return {**line, "segments": ours.trt_report().segments}


def shown(line: Line) -> str:
    """The line as a table of aligned columns, and the names that no class claims."""
    rows = [("class", "ms", "share", "floor, ms", "times floor", "launches"), *profile_rows(line)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
             for row in rows]  # fmt: skip
    others = [f"other: {ms:.3f} ms  {name[:100]}" for name, ms in list(line["other"].items())[:12]]
    copies = [f"{count:.0f} times {pair}" for pair, count in list(line["copies_before"].items())[:12]]
    return "\n".join((profile_title(line), *table, *others, *copies)) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--px", type=int, help="side of the picture; 1024 by default")
    parser.add_argument("--text-tokens", type=int, help="512 by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cache", help="folder of compiled engines; the library's own by default")
    parser.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/profile; with --tiny, none")
    parser.add_argument("--tiny", action="store_true", help="a small model on whatever device there is, as a self-test")
    args = parser.parse_args(argv)
    device, about = device_of(args.tiny), machine()
    px = args.px or (TINY_PX if args.tiny else 1024)
    text_tokens = args.text_tokens or (TINY_TEXT_TOKENS if args.tiny else 512)
    options = {"backend": args.backend, "cache_folder": args.cache}
    gpu = "" if args.tiny else about["gpu"]
    line = measure(device, args.precision, (px, text_tokens, args.batch), options, TINY if args.tiny else {}, gpu)
    line = {
        "run": args.run, **({"tiny": True} if args.tiny else {}), "precision": args.precision, "backend": args.backend,
        "height_px": px, "width_px": px, "text_tokens": text_tokens, "batch": args.batch, **line,
    }  # fmt: skip
    if gpu in PEAKS:
        line["peaks"] = asdict(PEAKS[gpu])
    folder = args.results or (None if args.tiny else RESULTS / "profile")
    if folder is not None:
        append(folder, [line], about)
    sys.stdout.write(shown(line))


if __name__ == "__main__":
    main()
