"""The whole demonstration: the story on eager PyTorch, the same on the compiled transformer, and what they cost."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from trt_core import compile_transformer, restore_transformer
from trt_core.errors import OutOfMemory
from trt_core.host import Silent
from trt_core.packages import installed

from .checkpoint import write_tiny_loras, write_tiny_pipeline
from .options import Options
from .phases import Performer, Phase, Take, encode, relative_error, story
from .pipeline import check_loras, load, quiet

TINY = "a tiny random FLUX"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "torch-tensorrt", "torch-tensorrt-rtx")


@dataclass(frozen=True, slots=True)
class Row:
    """One phase on both. `refits`: what the library reports of the weights it changed; a switch may take two.

    diffusers' own calls see base weights, so a LoRA is taken away when the next is loaded, and that is the first.
    """

    phase: Phase
    eager: Take
    compiled: Take
    refits: tuple[Any, ...]
    error: float

    @property
    def switch_ms(self) -> float | None:
        return sum(refit.milliseconds for refit in self.refits) if self.refits else None

    @property
    def layers_written(self) -> int | None:
        return sum(refit.layers for refit in self.refits) if self.refits else None


@dataclass(frozen=True, slots=True)
class Result:
    """`noise_floor`: how far eager PyTorch is from itself when only its attention kernel is exchanged.

    `restored_error`: how far the restored transformer is from what it was before compiling; 0 is bit for bit.
    """

    model: str
    device: str
    dtype: str
    rows: tuple[Row, ...]
    report: Any
    noise_floor: float
    restored_error: float
    versions: dict[str, str]


def run(options: Options) -> tuple[Result, FluxPipeline]:
    """The numbers and the pipeline, restored. Raises `TRTError` leaves for everything a user can do wrong."""
    quiet()
    try:
        return _run(options)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"The GPU ran out of memory at {options.size} px.",
            expected="FLUX.1 in bf16 needs about 30 GB at 1024x1024 px.",
            fix="Close other programs that use the GPU, or choose a smaller --size.",
        ) from error


def _run(options: Options) -> tuple[Result, FluxPipeline]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, loras = (options.model, options.loras) if options.model else _tiny(options)
    print(f"Loading {options.model or TINY} for {_name(device)}, {str(dtype).removeprefix('torch.')}", flush=True)
    pipe = load(model, dtype)
    check_loras(pipe, loras)
    text = encode(pipe, options.prompt, device)
    performer = Performer(pipe.to(device), text, loras, options)
    phases = story(options.size, len(loras))
    eager = _play("eager", performer, phases)
    with sdpa_kernel(SDPBackend.MATH):
        floor = relative_error(performer.play(phases[0]).latents, eager[0].latents)
    rows, report = _compiled(pipe, performer, phases, eager, options)
    restored = relative_error(performer.play(phases[0]).latents, eager[0].latents)
    dtype_name = str(dtype).removeprefix("torch.")
    return (
        Result(options.model or TINY, _name(device), dtype_name, rows, report, floor, restored, versions()),
        pipe,
    )


def _tiny(options: Options) -> tuple[str, Sequence[Path]]:
    """The checkpoint and LoRA files that come from nothing; the user's own LoRAs where there are some."""
    folder = write_tiny_pipeline(options.out / "tiny-flux")
    return str(folder), options.loras or write_tiny_loras(options.out / "tiny-loras")


def _play(how: str, performer: Performer, phases: Sequence[Phase]) -> list[Take]:
    takes = []
    for phase in phases:
        takes.append(performer.play(phase))
        print(f"  {how}: {phase.title}, {takes[-1].seconds:.2f} s", flush=True)
    performer.drop_loras()
    return takes


def _compiled(
    pipe: FluxPipeline, performer: Performer, phases: Sequence[Phase], eager: Sequence[Take], options: Options
) -> tuple[tuple[Row, ...], Any]:
    """Plays the story on the compiled transformer and restores it."""
    # A bar that redraws itself is for a terminal; a log file would hold every state of it.
    compile_transformer(pipe, backend=options.backend, progress=None if sys.stderr.isatty() else Silent())
    rows = []
    for phase, reference in zip(phases, eager, strict=True):
        seen = [_last_refit(pipe)]
        lora_call_ms = performer.change(phase)
        seen.append(_last_refit(pipe))
        take = performer.draw(phase, lora_call_ms)
        seen.append(_last_refit(pipe))
        refits = tuple(after for before, after in pairwise(seen) if after is not before)
        rows.append(Row(phase, reference, take, refits, relative_error(take.latents, reference.latents)))
        print(f"  compiled: {phase.title}, {take.seconds:.2f} s", flush=True)
    report = pipe.transformer.trt_report()
    performer.drop_loras()
    restore_transformer(pipe)
    return tuple(rows), report


def _last_refit(pipe: FluxPipeline) -> Any:
    return pipe.transformer.trt_report().last_refit


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"the CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """What is installed of the packages that matter, and Python."""
    found = {name: installed(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}
