"""What all tables of the README are made with: lines to rows to Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .lines import Line, read

PRECISIONS = {"bf16": "bf16", "fp8": "FP8"}


def lines_of(folder: Path) -> list[list[Line]]:
    """The lines of each GPU's file that has any, the GPU measured last first; those of small models are none."""
    files = ([line for line in read(path) if not line.get("tiny")] for path in sorted(folder.glob("*.jsonl")))
    return sorted(filter(None, files), key=_newest, reverse=True)


def _newest(lines: list[Line]) -> tuple[str, str]:
    """Lines from before the time was written down are older than all others."""
    return max((line.get("measured", ""), line["run"]) for line in lines)


def latest(lines: list[Line], keys: tuple[str, ...], order: Callable[[Line], Any] = lambda line: 0) -> list[Line]:
    """The last line of every case, cases of the last run first, those of a run by `order`, else as they first came."""
    runs = list(dict.fromkeys(line["run"] for line in reversed(lines)))
    first: dict[Any, int] = {}
    for index, line in enumerate(lines):
        first.setdefault((line["run"], _case(line, keys)), index)
    found = {_case(line, keys): line for line in lines}.values()
    return sorted(found, key=lambda line: (runs.index(line["run"]), order(line), first[line["run"], _case(line, keys)]))


def without_cut_off(lines: list[Line], keys: tuple[str, ...]) -> list[Line]:
    """The lines but those of a scenario's last run where the run before measured more of it.

    A run that was cut off does not take the place of a whole one; a scenario's batches go or stay together."""
    measured: dict[tuple[Any, ...], dict[str, set[tuple[Any, str]]]] = {}
    for line in lines:
        fields = {(line.get("batch"), name) for name in line}
        measured.setdefault(_case(line, keys), {}).setdefault(line["run"], set()).update(fields)
    cut_off = {(case, _cut_off(runs)) for case, runs in measured.items()}
    return [line for line in lines if (_case(line, keys), line["run"]) not in cut_off]


def _cut_off(runs: dict[str, set[tuple[Any, str]]]) -> str | None:
    """The last of these runs, if the one before it measured more."""
    before, last = [None, *runs][-2:]
    return last if before is not None and len(runs[last]) < len(runs[before]) else None


def _case(line: Line, keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in keys)


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; an empty cell was not measured."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, tuple("---" for _ in columns), *rows))


def number(line: Line, name: str, factor: float, form: str) -> str:
    return format(line[name] * factor, form) if name in line else ""


def stack(lines: list[Line]) -> str:
    """On what the lines were measured, as the first of them says; others add what it does not use."""
    versions = {name: version for line in (*lines, lines[0]) for name, version in line["versions"].items()}
    named = {name: versions[name] for name in (*lines[0]["versions"], *versions)}
    words = ", ".join(f"{name} {version}" for name, version in named.items() if version != "none")
    return f"{lines[0]['gpu']}, driver {lines[0]['driver']}, {words}."
