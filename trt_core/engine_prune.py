"""Which cache entries go first, and what killed processes have left behind."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import atomic_files
from .engine_entry import Entry, discard, entry_folders, load_entry, sweep_entry
from .engine_manifest import DIGEST, UnusableError

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune deleted and kept; `leftovers` counts damaged entries and what killed processes left."""

    removed: int
    removed_bytes: int
    kept: int
    kept_bytes: int
    leftovers: int


def choose_victims(
    entries: Sequence[Entry],
    here: Collection[Mapping[str, str]],
    max_bytes: int | None,
    unused_since: float | None,
) -> list[Entry]:
    """Entries to delete: all last used before `unused_since` (seconds), more until the rest fits `max_bytes`.

    Those made in no environment of `here` go first (other versions or GPU), then the least recently used.
    """
    old = [entry for entry in entries if unused_since is not None and entry.last_used < unused_since]
    if max_bytes is None:
        return old
    rest = [entry for entry in entries if entry not in old]
    rest.sort(key=lambda entry: (entry.manifest.environment in here, entry.last_used))
    excess = sum(entry.size_bytes for entry in rest) - max_bytes
    for entry in rest:
        if excess <= 0:
            break
        old.append(entry)
        excess -= entry.size_bytes
    return old


def sweep(gpu_folder: Path) -> int:
    """Deletes damaged entries and leftovers of killed processes in one GPU's folder; how many.

    The caller excludes other writers, so no temporary is still being written. Foreign files and links stay.
    """
    names = sorted(os.listdir(gpu_folder))
    temporaries = [gpu_folder / name for name in names if atomic_files.TEMPORARY.fullmatch(name)]
    for path in temporaries:
        atomic_files.remove_flat(path)
    for name in names:
        if name.endswith(".lock") and DIGEST.fullmatch(name.removesuffix(".lock")):
            _sweep_lock(gpu_folder / name)
    return len(temporaries) + sum(_sweep_entry_folder(path) for path in entry_folders(gpu_folder))


def _sweep_entry_folder(path: Path) -> int:
    try:
        entry = load_entry(path)
    except UnusableError as error:
        if not error.ours:
            return 0
        discard(path)
        return 1
    return sweep_entry(entry) if entry else 0


def _sweep_lock(path: Path) -> None:
    """A lock file goes when its lock is let go: whoever still holds it keeps it."""
    with suppress(OSError), atomic_files.file_lock(path, 0):
        pass
