"""`python -m benchmarks.report`: writes the README's tables from the committed JSON lines; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
_NAMES = {"eager": "diffusers, eager", "compile_repeated_blocks": "diffusers, `compile_repeated_blocks`",
          "mttm": "Torch-TensorRT's mutable module"}  # fmt: skip
_COLUMNS = (
    "what runs", "batch", "ms per step", "to eager", "first call, s", "warm first call, s", "LoRA switch, ms",
    "GPU peak, GB", "host above weights, GB", "plans, MB", "error to eager's (FP8: to a simulation's)",
)  # fmt: skip


def latest_run(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the last run in the file."""
    return [line for line in lines if line["run"] == lines[-1]["run"]] if lines else []


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table; an empty cell was not measured."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *(_row(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


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
    )


def _number(line: dict[str, Any], name: str, factor: float, form: str) -> str:
    return format(line[name] * factor, form) if name in line else ""


def section(path: Path) -> str:
    """The text between the README's marks for one results file."""
    lines = latest_run([json.loads(text) for text in path.read_text().splitlines()])
    if not lines:
        return ""
    about, versions = lines[0], lines[0]["versions"]
    stack = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    head = f"{about['gpu']}, driver {about['driver']}, {stack}; run {about['run']}."
    return f"{head}\n\n{table(lines)}"


def updated(readme: str) -> str:
    """The README with its section written anew."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    sections = [text for path in sorted(RESULTS.glob("*.jsonl")) if (text := section(path))]
    return before + BEGIN + "\n" + "\n\n".join(sections) + "\n" + END + after


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
