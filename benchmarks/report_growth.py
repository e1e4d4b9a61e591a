"""How cost grows with sizes and LoRAs: tables for the README, and the plot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .lines import Line
from .plot import Panel, Series, svg
from .report_tables import PRECISIONS, latest, number, stack, table

_KEYS = ("kind", "precision", "height_px", "text_tokens", "batch", "lora_rank", "loras")


def growth_section(lines: list[Line]) -> str:
    cases = latest(lines, _KEYS)
    steps = _beside(
        [line for line in cases if line["kind"] == "step"], ("batch", "text_tokens", "height_px"),
        ("batch", "text tokens", "picture, px per side"),
        (("ms per step", "step_ms", 1, ".1f"), ("GB above weights", "bytes_above_weights", 1e-9, ".1f")),
    )  # fmt: skip
    loras = _beside(
        [line for line in cases if line["kind"] == "lora"], ("loras", "lora_rank"), ("LoRAs at once", "rank"),
        (("ms per switch", "lora_switch_ms", 1, ".0f"), ("of which refit", "lora_refit_ms", 1, ".0f")),
    )  # fmt: skip
    return "\n\n".join(filter(None, (stack(cases), steps, _first_calls(cases), loras)))


def _first_calls(cases: list[Line]) -> str:
    """What a size that a process has not seen costs once above a step. Its first point of all compiles, and says
    nothing."""
    steps = [line for line in cases if "first_call_seconds" in line and not line.get("first_of_process")]
    sizes = [line for line in steps if (line["batch"], line["text_tokens"]) == (1, 512)]
    batches = [line for line in steps if line["batch"] > 1]
    kinds = {"A new resolution inside the profile": sizes, "A new batch size": batches}
    found = {what: ", ".join(filter(None, (_once(lines, p) for p in PRECISIONS))) for what, lines in kinds.items()}
    return " ".join(f"{what} costs once, above a step: {words}." for what, words in found.items() if words)


def _once(lines: list[Line], precision: str) -> str:
    """The range of all sizes, in seconds."""
    seconds = [line["first_call_seconds"] - line["step_ms"] / 1000 for line in lines if line["precision"] == precision]
    ends = list(dict.fromkeys(f"{end:.2f}" for end in (min(seconds), max(seconds)))) if seconds else []
    return f"{PRECISIONS[precision]} {' to '.join(ends)} s" if ends else ""


def _beside(
    lines: list[Line], keys: tuple[str, ...], names: tuple[str, ...], values: tuple[tuple[str, str, float, str], ...]
) -> str:
    """A table with a row for each case by `keys`, and each precision's `values` (name, field, factor, format) in it."""
    if not lines:
        return ""
    there = [precision for precision in PRECISIONS if any(line["precision"] == precision for line in lines)]
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in keys), {})[line["precision"]] = line
    columns = [f"{PRECISIONS[precision]}, {name}" for precision in there for name, *_ in values]
    rows = []
    for case in sorted(found):
        cells = [_cell(found[case].get(precision, {}), *value[1:]) for precision in there for value in values]
        runs = sorted({line["run"] for line in found[case].values()})
        rows.append((*map(str, case), *cells, ", ".join(runs)))
    return table((*names, *columns, "run"), rows)


def _cell(line: Line, field: str, factor: float, form: str) -> str:
    return "does not fit" if "skipped" in line else number(line, field, factor, form)


def growth_plot(files: list[list[Line]]) -> str:
    """The SVG of all GPUs' lines, or nothing where there are none."""
    cases = [line for lines in files for line in latest(lines, _KEYS) if "skipped" not in line]
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
        for precision, name in PRECISIONS.items():
            mine = sorted((line for line in lines if (line["gpu"], line["precision"]) == (gpu, precision)), key=x)
            if mine:
                points = tuple((x(line), line[field]) for line in mine)
                labels = tuple(f"{words(line)}: {line[field]:.1f} ms" for line in mine)
                made.append(Series(name if len(gpus) == 1 else f"{gpu}, {name}", points, labels))
    return tuple(made)


def _size_of(line: Line) -> str:
    return f"{line['width_px']} x {line['height_px']} px"
