"""`python -m benchmarks.report`: writes the README's tables and the plot from the committed JSON lines; `--check` only
compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .lines import RESULTS, Line, with_ratios
from .report_fp8 import fp8_section
from .report_growth import growth_plot, growth_section
from .report_tables import PRECISIONS, latest, lines_of, number, stack, table, without_cut_off
from .scenarios import SCENARIOS

ROOT = Path(__file__).resolve().parents[1]
_PART = "<!-- {} -->"
_NAMES = {"eager": "diffusers, eager", "compile_repeated_blocks": "diffusers, `compile_repeated_blocks`",
          "torchao": "diffusers, `compile_repeated_blocks`, torchao FP8 per row",
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
_SCENARIO = ("scenario", "precision", "backend", "base_weights", "height_px", "text_tokens")
_PROFILE_KEYS = ("precision", "backend", "height_px", "text_tokens", "batch")
_PROFILE_COLUMNS = ("what the kernels are for", "ms", "share", "floor, ms", "times floor", "launches")
GROWTH_PLOT = "growth.svg"


def _row(line: Line) -> tuple[str, ...]:
    name = _NAMES.get(line["scenario"], "")
    if not name:
        base = f", base weights on the {line['base_weights']}" if line.get("base_weights") else ""
        fp8 = ", FP8" if line.get("precision") == "fp8" else ""
        name = f'this library{fp8}, `backend="{line["backend"]}"`{base}'
    return (
        name,
        str(line["batch"]),
        number(line, "step_ms", 1, ".1f"),
        number(line, "ratio_to_eager", 1, ".2f"),
        _first_call(line),
        number(line, "warm_first_call_seconds", 1, ".1f"),
        number(line, "lora_switch_ms", 1, ".0f"),
        number(line, "gpu_peak_bytes", 1e-9, ".1f"),
        number(line, "host_peak_bytes_above_weights", 1e-9, ".1f"),
        number(line, "plan_bytes", 1e-6, ".1f") if line.get("plan_bytes") else "",
        number(line, "error_ratio", 1, ".2f"),
        line["run"],
    )


def _first_call(line: Line) -> str:
    """What it took, or for a process that was stopped meanwhile, what it had taken by then."""
    at_least = number(line, "first_call_seconds_at_least", 1, ".0f")
    return number(line, "first_call_seconds", 1, ".1f") or (f"over {at_least}" if at_least else "")


def _comfyui_row(line: Line) -> tuple[str, ...]:
    own = line["scenario"] == "comfyui"
    base = f", base weights on the {line.get('base_weights')}"
    switch = line["switch_seconds"]
    return (
        "ComfyUI itself" if own else f"TRT Compile Transformer, {line['backend']}{base}",
        _SERVERS.get(line["mode"], line["mode"]),
        number(line, "step_ms", 1, ".1f"),
        number(line, "first_run_seconds", 1, ".1f"),
        *(f"{switch[name]:.2f}" for name in ("addition", "other_file", "other_strength", "removal")),
        number(line, "gpu_peak_bytes", 1e-9, ".1f"),
        number(line, "error_to_stock", 1, ".1e"),
        line["run"],
    )


_SERVERS = {"dynamic": "Dynamic VRAM", "legacy": "`--disable-dynamic-vram`", "lowvram": "`--lowvram`"}


def _section(lines: list[Line]) -> str:
    """The text for one GPU: on what it was measured, and a table."""
    cases = latest(without_cut_off(with_ratios(lines), _SCENARIO), _KEYS, _place)
    return f"{stack(cases)}\n\n{table(_COLUMNS, [_row(line) for line in cases])}"


def _comfyui_section(lines: list[Line]) -> str:
    cases = latest(lines, _KEYS)
    return f"{stack(cases)}\n\n{table(_COMFYUI_COLUMNS, [_comfyui_row(line) for line in cases])}"


def _place(line: Line) -> tuple[int, int]:
    """Where a run goes through this scenario: two processes may have written its lines side by side."""
    names = ("scenario", "precision", "backend", "base_weights")
    order = [tuple(getattr(scenario, name) for name in names) for scenario in SCENARIOS]
    case = tuple(line.get(name) for name in names)
    return (order.index(case) if case in order else len(order)), line["batch"]


# -- one step by kernel ------------------------------------------------------------------------------------------------


def profile_title(line: Line) -> str:
    """What was profiled, and the numbers of the whole step."""
    floor = f", {line['step_ms'] / line['floor_ms']:.2f} times the floor" if "floor_ms" in line else ""
    return (
        f'{PRECISIONS[line["precision"]]}, `backend="{line["backend"]}"`, {line["height_px"]} px, '
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
    return "\n\n".join((stack(cases), *parts))


# -- the README --------------------------------------------------------------------------------------------------------


def updated(readme: str, results: Path = RESULTS) -> str:
    """The README with its generated parts written anew."""
    own = [_section(lines) for lines in lines_of(results)]
    comfyui = [_comfyui_section(lines) for lines in lines_of(results / "comfyui")]
    growth = [growth_section(lines) for lines in lines_of(results / "growth")]
    if growth:
        growth.append(f"![Step time by picture size, LoRA switch by rank](benchmarks/results/{GROWTH_PLOT})")
    profiles = [_profile_section(lines) for lines in lines_of(results / "profile")]
    fp8 = [fp8_section(lines) for lines in lines_of(results / "fp8")]
    parts = {"benchmark": own, "fp8 benchmark": fp8, "comfyui benchmark": comfyui, "growth benchmark": growth,
             "profile benchmark": profiles}  # fmt: skip
    for part, sections in parts.items():
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
