"""Files of results: one JSON line per measurement, one file per GPU."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Line = dict[str, Any]


def file_name(gpu: str) -> str:
    """The name of a GPU's results file."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".jsonl"


def append(path: Path, line: Line) -> None:
    """Adds a line, with the time of now, in one system call: processes on two GPUs of one host write to one file, and a
    buffered file would cut what is longer than its buffer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**line, "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read(path: Path) -> list[Line]:
    """All lines of a file; none where there is no file."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def with_ratios(lines: list[Line]) -> list[Line]:
    """The lines with `ratio_to_eager`: a step against eager's last one of the same run, batch and size.

    Computed from the whole file: processes on two GPUs write to it, and eager's line may come after the others.
    """
    eager = {_size(line): line["step_ms"] for line in lines if line.get("scenario") == "eager" and "step_ms" in line}
    return [
        {**line, "ratio_to_eager": line["step_ms"] / eager[_size(line)]} if _comparable(line, eager) else line
        for line in lines
    ]


def _size(line: Line) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in ("run", "batch", "height_px", "width_px", "text_tokens"))


def _comparable(line: Line, eager: dict[tuple[Any, ...], float]) -> bool:
    return "step_ms" in line and _size(line) in eager
