"""`python -m trt_core.cache`: see, shrink, empty, export and import the engine cache."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .engine_bundle import export_bundle, import_bundle
from .engine_cache import FOLDER_VARIABLE, EngineCache, Entry
from .errors import TRTError
from .gpu import environments

_GB = 10**9
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
_WIDEST = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; exit code 0, 1 after an error (said on stderr) or 2 after bad usage."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(EngineCache(chosen.folder), chosen))
    except TRTError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trt_core.cache", description=__doc__)
    parser.set_defaults(folder=None)
    common = argparse.ArgumentParser(add_help=False)
    where = f"the cache folder (default: {FOLDER_VARIABLE}, else the user's cache)"
    common.add_argument("--folder", default=argparse.SUPPRESS, help=where)
    parser.add_argument("--folder", help=where)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[common], help=summary, description=summary)
        made.set_defaults(run=run)
        return made

    every = "for every GPU, not only the current one"
    command("list", _list, "show what is stored").add_argument("--all", action="store_true", help=every)
    prune = command("prune", _prune, "delete leftovers and damaged, old or least recently used entries")
    prune.add_argument("--max-gb", type=_positive, help="keep at most this many GB, over all GPUs")
    prune.add_argument("--max-age-days", type=_positive, help="delete what was not used for so many days")
    clear = command("clear", _clear, "delete all entries")
    clear.add_argument("--all", action="store_true", help=every)
    clear.add_argument("--yes", action="store_true", help="really delete; without this nothing happens")
    export = command("export", _export, "write the entries of this GPU and these versions to one file")
    export.add_argument("file", metavar="FILE")
    imported = command("import", _import, "take over a file exported on a machine like this one")
    imported.add_argument("file", metavar="FILE")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def _list(cache: EngineCache, chosen: argparse.Namespace) -> int:
    entries = cache.entries(all_gpus=chosen.all)
    if not entries:
        return _say(f"No engines in {cache.folder}.")
    here = environments()
    rows = [("GPU", "WHAT", "SIZE", "LAST USED"), *(_row(entry, here) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        _say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return _say(f"{_engines(len(entries))}, {_size(_total(entries))}, in {cache.folder}")


def _prune(cache: EngineCache, chosen: argparse.Namespace) -> int:
    max_bytes = None if chosen.max_gb is None else int(chosen.max_gb * _GB)
    report = cache.prune(max_bytes, chosen.max_age_days)
    removed = f"{_engines(report.removed)}, {_size(report.removed_bytes)}"
    _say(f"Deleted {removed}, and {report.leftovers} leftovers.")
    return _say(f"Kept {_engines(report.kept)}, {_size(report.kept_bytes)}, in {cache.folder}")


def _clear(cache: EngineCache, chosen: argparse.Namespace) -> int:
    if not chosen.yes:
        entries = cache.entries(all_gpus=chosen.all)
        doomed = f"{_engines(len(entries))}, {_size(_total(entries))}, in {cache.folder}"
        sys.stderr.write(f"This deletes {doomed}. Add --yes to do it.\n")
        return 2
    count, size_bytes = cache.clear(all_gpus=chosen.all)
    return _say(f"Deleted {_engines(count)}, {_size(size_bytes)}, in {cache.folder}")


def _export(cache: EngineCache, chosen: argparse.Namespace) -> int:
    report = export_bundle(cache, chosen.file)
    return _say(f"Wrote {_engines(report.entries)}, {_size(report.size_bytes)}, to {chosen.file}")


def _import(cache: EngineCache, chosen: argparse.Namespace) -> int:
    report = import_bundle(cache, chosen.file)
    there = f"; {len(report.present)} were there before" if report.present else ""
    return _say(f"Imported {_engines(len(report.added))}, {_size(report.size_bytes)}, to {cache.folder}{there}")


def _row(entry: Entry, here: Sequence[Mapping[str, str]]) -> tuple[str, str, str, str]:
    seen = entry.manifest.environment
    gpu = seen.get("gpu", "none")
    what = _what(entry) + ("" if seen in here else " (other versions)")
    age = _age(time.time() - entry.last_used)
    return "no GPU" if gpu == "none" else _short(gpu), what, _size(entry.size_bytes), age


def _what(entry: Entry) -> str:
    """Kind and the plain values of an entry's info, such as "engine segment=double_qkv tokens=4096"."""
    plain = [f"{name}={value}" for name, value in entry.info.items() if not isinstance(value, (dict, list))]
    return _short(" ".join([entry.manifest.kind, *plain]))


def _short(text: str) -> str:
    """`text` cut for a table, without the control characters that a foreign manifest may hold."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= _WIDEST else printable[: _WIDEST - 3] + "..."


def _engines(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def _total(entries: Sequence[Entry]) -> int:
    return sum(entry.size_bytes for entry in entries)


def _size(size_bytes: int) -> str:
    for unit_bytes, unit in _UNITS:
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes} B"


def _age(seconds: float) -> str:
    for unit_seconds, unit in _AGES:
        if seconds >= unit_seconds:
            return f"{seconds / unit_seconds:.0f} {unit} ago"
    return "now"


def _say(line: str) -> int:
    sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
