"""`python -m benchmarks.report`: writes the README's tables from the committed JSON lines; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
_PART = "<!-- {} -->"
_NAMES = {"eager": "diffusers, eager", "compile_repeated_blocks": "diffusers, `compile_repeated_blocks`",
          "mttm": "Torch-TensorRT's mutable module"}  # fmt: skip
_COLUMNS = (
    "what runs", "batch", "ms per step", "to eager", "first call, s", "warm first call, s", "LoRA switch, ms",
    "GPU peak, GB", "host above weights, GB", "plans, MB", "error", "run",
)  # fmt: skip
_COMFYUI_COLUMNS = (
    "what runs", "server", "ms per step", "first run, s", "LoRA added, s", "another file, s", "another strength, s",
    "removed, s", "GPU peak, GB", "difference to ComfyUI's own", "run",
)  # fmt: skip
_KEYS = ("scenario", "mode", "precision", "backend", "base_weights", "lora_node", "batch", "height_px", "text_tokens")


def latest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of every case, cases of the last run first and each run in its own order."""
    found = {tuple(line.get(key) for key in _KEYS): line for line in lines}
    runs = list(dict.fromkeys(line["run"] for line in reversed(lines)))
    return sorted(found.values(), key=lambda line: (runs.index(line["run"]), lines.index(line)))


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; an empty cell was not measured."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, tuple("---" for _ in columns), *rows))


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    name = _NAMES.get(line["scenario"], "")
    if not name:
        base = f", base weights on the {line['base_weights']}" if line.get("base_weights") else ""
        fp8 = ", FP8" if line.get("precision") == "fp8" else ""
        name = f'this library{fp8}, `backend="{line["backend"]}"`{base}'
    return (
        name,
        str(line["batch"]),
        _number(line, "step_ms", 1, ".1f"),
        _number(line, "ratio_to_eager", 1, ".2f"),
        _number(line, "first_call_seconds", 1, ".1f"),
        _number(line, "warm_first_call_seconds", 1, ".1f"),
        _number(line, "lora_switch_ms", 1, ".0f"),
        _number(line, "gpu_peak_bytes", 1e-9, ".1f"),
        _number(line, "host_peak_bytes_above_weights", 1e-9, ".1f"),
        _number(line, "plan_bytes", 1e-6, ".1f") if line.get("plan_bytes") else "",
        _number(line, "error_ratio", 1, ".2f"),
        line["run"],
    )


def _comfyui_row(line: dict[str, Any]) -> tuple[str, ...]:
    own = line["scenario"] == "comfyui"
    base = f", base weights on the {line.get('base_weights')}"
    switch = line["switch_seconds"]
    return (
        "ComfyUI itself" if own else f"TRT Compile Transformer, {line['backend']}{base}",
        _SERVERS.get(line["mode"], line["mode"]),
        _number(line, "step_ms", 1, ".1f"),
        _number(line, "first_run_seconds", 1, ".1f"),
        *(f"{switch[name]:.2f}" for name in ("addition", "other_file", "other_strength", "removal")),
        _number(line, "gpu_peak_bytes", 1e-9, ".1f"),
        _number(line, "error_to_stock", 1, ".1e"),
        line["run"],
    )


_SERVERS = {"dynamic": "Dynamic VRAM", "legacy": "`--disable-dynamic-vram`", "lowvram": "`--lowvram`"}


def _number(line: dict[str, Any], name: str, factor: float, form: str) -> str:
    return format(line[name] * factor, form) if name in line else ""


def section(path: Path, columns: tuple[str, ...], row: Callable[[dict[str, Any]], tuple[str, ...]]) -> str:
    """The text for one results file: on what it was measured, and a table."""
    lines = latest([json.loads(text) for text in path.read_text().splitlines()])
    if not lines:
        return ""
    about, versions = lines[0], lines[0]["versions"]
    stack = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    return f"{about['gpu']}, driver {about['driver']}, {stack}.\n\n{table(columns, [row(line) for line in lines])}"


def updated(readme: str) -> str:
    """The README with its generated parts written anew."""
    own = [section(path, _COLUMNS, _row) for path in sorted(RESULTS.glob("*.jsonl"))]
    comfyui = [section(path, _COMFYUI_COLUMNS, _comfyui_row) for path in sorted((RESULTS / "comfyui").glob("*.jsonl"))]
    return _replaced(_replaced(readme, "benchmark", own), "comfyui benchmark", comfyui)


def _replaced(readme: str, part: str, sections: list[str]) -> str:
    begin, end = _PART.format(f"{part}:begin"), _PART.format(f"{part}:end")
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    return before + begin + "\n" + "\n\n".join(filter(None, sections)) + "\n" + end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the README is not up to date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    new = updated(text)
    if args.check:
        sys.exit(0 if new == text else "README.md is not up to date: python -m benchmarks.report")
    path.write_text(new)


if __name__ == "__main__":
    main()
