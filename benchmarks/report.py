"""`python -m benchmarks.report`: writes the README's tables and the plot from the committed JSON lines; `--check` only
compares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .plot import Panel, Series, svg

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
_GROWTH_KEYS = ("kind", "precision", "height_px", "text_tokens", "batch", "lora_rank", "loras")
_PROFILE_KEYS = ("precision", "backend", "height_px", "text_tokens", "batch")
_PROFILE_COLUMNS = ("what the kernels are for", "ms", "share", "floor, ms", "times floor", "launches")
_PRECISIONS = {"bf16": "bf16", "fp8": "FP8"}
GROWTH_PLOT = "growth.svg"
Line = dict[str, Any]


def latest(lines: list[dict[str, Any]], keys: tuple[str, ...] = _KEYS) -> list[dict[str, Any]]:
    """The last line of every case, cases of the last run first and each run in its own order."""
    found = {tuple(line.get(key) for key in keys): line for line in lines}
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
    return f"{_stack(lines[0])}\n\n{table(columns, [row(line) for line in lines])}"


def _stack(about: Line) -> str:
    stack = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version != "none")
    return f"{about['gpu']}, driver {about['driver']}, {stack}."


# -- one step by kernel ------------------------------------------------------------------------------------------------


def profile_title(line: Line) -> str:
    """What was profiled, and the numbers of the whole step."""
    floor = f", {line['step_ms'] / line['floor_ms']:.2f} times the floor" if "floor_ms" in line else ""
    return (
        f'{_PRECISIONS[line["precision"]]}, `backend="{line["backend"]}"`, {line["height_px"]} px, '
        f"{line['text_tokens']} text tokens, batch {line['batch']}: {line['step_ms']:.1f} ms per step{floor}; "
        f"the GPU idles {line['idle_share']:.1%}."
    )


def profile_rows(line: Line) -> list[tuple[str, ...]]:
    """A row for each class of kernels; no floor where none is known, or where the least is nothing."""
    rows = []
    for name, seen in line["classes"].items():
        floor = seen.get("floor_ms")
        times = f"{seen['ms'] / floor:.2f}" if floor else ""
        least = "" if floor is None else f"{floor:.2f}"
        rows.append((name, f"{seen['ms']:.2f}", f"{seen['share']:.1%}", least, times, f"{seen['launches']:.0f}"))
    return rows


def _profile_section(lines: list[Line]) -> str:
    cases = latest(lines, _PROFILE_KEYS)
    parts = [f"{profile_title(case)} Run {case['run']}.\n\n{table(_PROFILE_COLUMNS, profile_rows(case))}"
             for case in cases]  # fmt: skip
    return "\n\n".join((_stack(cases[0]), *parts))


# -- growth ------------------------------------------------------------------------------------------------------------


def _growth_section(lines: list[Line]) -> str:
    cases = latest(lines, _GROWTH_KEYS)
    steps = _beside(
        [line for line in cases if line["kind"] == "step"], ("batch", "text_tokens", "height_px"),
        ("batch", "text tokens", "picture, px per side"),
        (("ms per step", "step_ms", 1, ".1f"), ("GB above weights", "bytes_above_weights", 1e-9, ".1f")),
    )  # fmt: skip
    loras = _beside(
        [line for line in cases if line["kind"] == "lora"], ("loras", "lora_rank"), ("LoRAs at once", "rank"),
        (("ms per switch", "lora_switch_ms", 1, ".0f"), ("of which refit", "lora_refit_ms", 1, ".0f")),
    )  # fmt: skip
    return "\n\n".join(filter(None, (_stack(cases[0]), steps, loras)))


def _beside(
    lines: list[Line], keys: tuple[str, ...], names: tuple[str, ...], values: tuple[tuple[str, str, float, str], ...]
) -> str:
    """A table with a row for each case by `keys`, and each precision's `values` (name, field, factor, format) in it."""
    if not lines:
        return ""
    there = [precision for precision in _PRECISIONS if any(line["precision"] == precision for line in lines)]
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in keys), {})[line["precision"]] = line
    columns = [f"{_PRECISIONS[precision]}, {name}" for precision in there for name, *_ in values]
    rows = []
    for case in sorted(found):
        cells = [_cell(found[case].get(precision, {}), *value[1:]) for precision in there for value in values]
        runs = sorted({line["run"] for line in found[case].values()})
        rows.append((*map(str, case), *cells, ", ".join(runs)))
    return table((*names, *columns, "run"), rows)


def _cell(line: Line, field: str, factor: float, form: str) -> str:
    return "does not fit" if "skipped" in line else _number(line, field, factor, form)


def growth_plot(files: list[list[Line]]) -> str:
    """The SVG of all GPUs' lines, or nothing where there are none."""
    cases = [line for lines in files for line in latest(lines, _GROWTH_KEYS) if "skipped" not in line]
    steps = [line for line in cases if line["kind"] == "step" and (line["batch"], line["text_tokens"]) == (1, 512)]
    loras = [line for line in cases if line["kind"] == "lora" and line["loras"] == 1]
    panels = []
    if steps:
        series = _series(steps, lambda line: line["height_px"] * line["width_px"] * 1e-6, "step_ms", _size_of)
        panels.append(Panel("One step, batch 1, 512 text tokens", "picture, megapixels", "step, ms", series))
    if loras:
        series = _series(loras, lambda line: line["lora_rank"], "lora_switch_ms", lambda line: f"{line['lora_rank']}")
        panels.append(Panel("LoRA switch, all block matrices", "LoRA rank", "switch, ms", series))
    return svg(panels, "How the cost of a step and of a LoRA switch grows") if panels else ""


def _series(
    lines: list[Line], x: Callable[[Line], float], field: str, words: Callable[[Line], str]
) -> tuple[Series, ...]:
    gpus = list(dict.fromkeys(line["gpu"] for line in lines))
    made = []
    for gpu in gpus:
        for precision, name in _PRECISIONS.items():
            mine = sorted((line for line in lines if (line["gpu"], line["precision"]) == (gpu, precision)), key=x)
            if mine:
                points = tuple((x(line), line[field]) for line in mine)
                labels = tuple(f"{words(line)}: {line[field]:.1f} ms" for line in mine)
                made.append(Series(name if len(gpus) == 1 else f"{gpu}, {name}", points, labels))
    return tuple(made)


def _size_of(line: Line) -> str:
    return f"{line['width_px']} x {line['height_px']} px"


# -- the README --------------------------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[list[Line]]:
    """The lines of each GPU's file that has any; those of small models are none."""
    files = [[json.loads(text) for text in path.read_text().splitlines()] for path in sorted(folder.glob("*.jsonl"))]
    return list(filter(None, ([line for line in lines if not line.get("tiny")] for lines in files)))


def updated(readme: str, results: Path = RESULTS) -> str:
    """The README with its generated parts written anew."""
    own = [section(path, _COLUMNS, _row) for path in sorted(results.glob("*.jsonl"))]
    comfyui = [section(path, _COMFYUI_COLUMNS, _comfyui_row) for path in sorted((results / "comfyui").glob("*.jsonl"))]
    growth = [_growth_section(lines) for lines in lines_of(results / "growth")]
    if growth:
        growth.append(f"![Step time by picture size, LoRA switch by rank](benchmarks/results/{GROWTH_PLOT})")
    profiles = [_profile_section(lines) for lines in lines_of(results / "profile")]
    for part, sections in (("benchmark", own), ("comfyui benchmark", comfyui), ("growth benchmark", growth),
                           ("profile benchmark", profiles)):  # fmt: skip
        readme = _replaced(readme, part, sections)
    return readme


def _replaced(readme: str, part: str, sections: list[str]) -> str:
    begin, end = _PART.format(f"{part}:begin"), _PART.format(f"{part}:end")
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    return before + begin + "\n" + "\n\n".join(filter(None, sections)) + "\n" + end + after


def stale(readme: Path, results: Path) -> dict[Path, str]:
    """The files that the lines would write otherwise, with the text they should have; none means no file."""
    wanted = {
        readme: updated(readme.read_text(), results),
        results / GROWTH_PLOT: growth_plot(lines_of(results / "growth")),
    }
    return {path: text for path, text in wanted.items() if text != (path.read_text() if path.exists() else "")}


def write(path: Path, text: str) -> None:
    if text:
        path.write_text(text)
    else:
        path.unlink()


def main(argv: list[str] | None = None, readme: Path = ROOT / "README.md", results: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the README or the plot is not up to date")
    args = parser.parse_args(argv)
    changed = stale(readme, results)
    if args.check:
        names = ", ".join(path.name for path in changed)
        sys.exit(f"{names}: not up to date, run python -m benchmarks.report" if changed else 0)
    for path, text in changed.items():
        write(path, text)


if __name__ == "__main__":
    main()
