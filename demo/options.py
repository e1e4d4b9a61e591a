"""What the user asked for, checked before anything is loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trt_core.config import PIXELS_PER_TOKEN, Backend, choice, image_tokens
from trt_core.errors import InvalidFile, InvalidOption

PROMPT = "a red cat in a castle, photo"
TINY_SIZE, FULL_SIZE = "128x128", "1024x1024"


@dataclass(frozen=True, slots=True)
class Size:
    """A picture's size in pixels; both sides are multiples of 16."""

    width_px: int
    height_px: int

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Raises `InvalidOption` unless it is WIDTHxHEIGHT in multiples of 16 px."""
        match = re.fullmatch(r"(\d+)x(\d+)", text.strip(), re.IGNORECASE)
        if match is None:
            raise InvalidOption(f"--size {text} is no size.", fix="Write it as 1024x768.", widget="size")
        size = cls(int(match[1]), int(match[2]))
        image_tokens(size.height_px, size.width_px)
        return size

    def other(self) -> Size:
        """Another size of about the same area, taller than wide: 832x1216 for 1024x1024."""
        width_px, height_px = (
            round(side_px * part / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN
            for side_px, part in ((self.width_px, 13 / 16), (self.height_px, 19 / 16))
        )
        return Size(max(PIXELS_PER_TOKEN, width_px), max(self.height_px + PIXELS_PER_TOKEN, height_px))


@dataclass(frozen=True, slots=True)
class Options:
    """`model` None: the tiny random checkpoint, with its own two LoRAs where `loras` is empty."""

    model: str | None
    loras: tuple[Path, ...]
    prompt: str
    steps: int
    size: Size
    backend: Backend
    out: Path
    json: Path | None
    seed: int


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line. Raises `InvalidOption` or `InvalidFile`; argparse ends the program by itself."""
    given = _parser().parse_args(arguments)
    if given.steps < 1:
        raise InvalidOption(f"--steps {given.steps} is too few.", fix="Use at least 1.", widget="steps")
    backend = choice(Backend, given.backend, "backend")
    if backend is Backend.MTTM:
        raise InvalidOption(
            "The demo shows segments, and backend='mttm' has none.",
            fix="Use another backend; `python -m benchmarks.run` compares with it.",
            widget="backend",
        )
    loras = tuple(Path(path) for path in given.lora)
    for path in loras:
        if not path.is_file():
            raise InvalidFile(f"There is no LoRA file {path}.", fix="Check the path after --lora.", widget="lora")
    return Options(
        model=given.model,
        loras=loras,
        prompt=given.prompt,
        steps=given.steps,
        size=Size.parse(given.size or (FULL_SIZE if given.model else TINY_SIZE)),
        backend=backend,
        out=Path(given.out),
        json=Path(given.json) if given.json else None,
        seed=given.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python run.py demo",
        description="Compiles a FLUX pipeline, changes its LoRA, and shows what runs where, what each phase costs and "
        "how far the result is from eager PyTorch. Without --model it writes and uses a tiny random FLUX.",
    )
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a FLUX pipeline as diffusers saves it, or its name")
    parser.add_argument("--lora", metavar="FILE", nargs="+", default=[], help="LoRA files, used one after the other")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", metavar="WxH", help=f"in pixels; {TINY_SIZE}, or {FULL_SIZE} with --model")
    parser.add_argument("--backend", default="auto", help="auto (default), tensorrt, inductor or eager")
    parser.add_argument("--out", metavar="DIR", default="demo-out", help="folder for pictures (default: demo-out)")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument("--seed", type=int, default=0)
    return parser
