"""Compiled engines and plans on disk, one folder per GPU and entry; only whole entries are ever seen.

A cache is never needed: `get` answers None for anything it cannot use, and a caller that catches `CacheError`
from `put` and `update` goes on with what it built, to build it again next time.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .atomic_files import file_lock, is_real_folder, never
from .engine_entry import (
    Entry,
    discard,
    entry_folders,
    load_entry,
    load_verified,
    update_payload,
    write_entry,
)
from .engine_manifest import MANIFEST, EngineKey, Manifest, UnusableError, check_payload_name
from .engine_prune import SECONDS_PER_DAY, PruneReport, choose_victims, sweep
from .errors import BuildCancelled, CacheError
from .gpu import environment, environments, gpu_slug
from .user_folders import cache_folder

__all__ = ["EngineCache", "EngineKey", "Entry", "PruneReport", "default_folder"]

FOLDER_VARIABLE = "TRT_CORE_CACHE"
BUILD_WAIT_SECONDS = 600.0
"""Longest wait for another process's build; the slowest engine measured takes a tenth of it."""
WRITE_WAIT_SECONDS = 60.0
_GPU_FOLDER = re.compile(r"no-gpu|[a-z0-9-]+-sm\d+")
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_log = logging.getLogger("trt_core.cache")
_said: set[Path] = set()
"""Entries whose damage is already in this process's log."""


def default_folder() -> Path:
    """The user's cache folder: TRT_CORE_CACHE if set, else "trt_core" where the system keeps caches."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen).expanduser()
    try:
        return cache_folder()
    except RuntimeError as error:
        fix = f"Set {FOLDER_VARIABLE} to a folder."
        raise CacheError("This user has no home folder for a cache.", fix=fix) from error


class EngineCache:
    """Entries under `folder` (None: `default_folder()`): `<gpu>/<digest>/manifest.json` and payload files.

    The folder is made by the first `put`. A folder that can only be read serves `get` and `entries`.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()

    def get(self, key: EngineKey) -> Entry | None:
        """The entry of `key`, every payload verified, now the most recently used; None if there is none."""
        path = self._path(key.digest)
        entry = self._or_none(path, load_verified)
        if entry is not None:
            with suppress(OSError):  # a cache that can only be read has no order of use
                os.utime(path / MANIFEST)
        return entry

    def put(self, key: EngineKey, files: Mapping[str, bytes], info: Mapping[str, Any]) -> Entry:
        """Stores `files` (name -> bytes) under `key` in place of what was there; `info` is for people.

        Raises `CacheError` when the folder cannot be written or the disk is full; nothing is stored then.
        """
        manifest = Manifest.describe(key, files, info)
        path = self._path(manifest.digest)
        with self._writing(path.parent):
            write_entry(path, manifest, files)
        return Entry(path, manifest, manifest.created)

    def update(self, key: EngineKey, name: str, data: bytes) -> Entry:
        """Adds or replaces one payload of a stored entry in one step; `CacheError` if there is no entry."""
        check_payload_name(name)
        path = self._path(key.digest)
        with self._writing(path.parent):
            entry = self._or_none(path, load_entry)
            if entry is None:
                raise CacheError(f"The engine cache lost its entry {path}.", fix="Run again to build it.")
            return update_payload(entry, name, data)

    @contextmanager
    def lock(
        self,
        key: EngineKey,
        cancelled: Callable[[], bool] = never,
        timeout_seconds: float = BUILD_WAIT_SECONDS,
    ) -> Iterator[bool]:
        """True while this process alone builds `key`: `get` it again inside, the one before may have put it.

        False after `timeout_seconds`, or where files cannot be locked: build aside, `put` is safe all the
        same. The lock of a process that died is free. Raises `BuildCancelled` if `cancelled()` while waiting.
        """
        with ExitStack() as stack:
            yield self._enter_lock(stack, self._path(key.digest), cancelled, timeout_seconds)

    def entries(self, all_gpus: bool = False) -> list[Entry]:
        """Entries of this GPU, or of all, last used first. Only `get` and `read` check sha256."""
        folders = [path for folder in self._gpu_folders(all_gpus) for path in entry_folders(folder)]
        found = [entry for path in folders if (entry := self._or_none(path, load_entry)) is not None]
        return sorted(found, key=lambda entry: entry.last_used, reverse=True)

    def prune(self, max_bytes: int | None = None, max_age_days: float | None = None) -> PruneReport:
        """Deletes leftovers, entries of any GPU unused for `max_age_days`, then more to fit into `max_bytes`.

        Those made by other versions or for a GPU that is gone go first, then the least recently used.
        """
        leftovers = self._sweep(all_gpus=True)
        entries = self.entries(all_gpus=True)
        since = None if max_age_days is None else time.time() - max_age_days * SECONDS_PER_DAY
        victims = choose_victims(entries, environments(), max_bytes, since)
        self._discard(victims)
        removed, total = (sum(entry.size_bytes for entry in some) for some in (victims, entries))
        return PruneReport(len(victims), removed, len(entries) - len(victims), total - removed, leftovers)

    def clear(self, all_gpus: bool = False) -> tuple[int, int]:
        """Deletes all entries of this GPU, or of all; how many entries and bytes. What is not ours stays."""
        self._sweep(all_gpus)
        entries = self.entries(all_gpus)
        self._discard(entries)
        return len(entries), sum(entry.size_bytes for entry in entries)

    def _path(self, digest: str) -> Path:
        return self.folder / gpu_slug(environment()) / digest

    def _gpu_folders(self, all_gpus: bool) -> list[Path]:
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._error("read", error) from error
        mine = None if all_gpus else gpu_slug(environment())
        found = [name for name in names if _GPU_FOLDER.fullmatch(name) and mine in (None, name)]
        return [self.folder / name for name in found if is_real_folder(self.folder / name)]

    def _or_none(self, path: Path, load: Callable[[Path], Entry | None]) -> Entry | None:
        """The entry if it can be used; the reason why not is logged once for each entry."""
        try:
            return load(path)
        except UnusableError as error:
            if path not in _said:
                _said.add(path)
                _log.warning("Ignoring the cached engine %s: %s. It will be built again.", path, error)
            return None

    def _sweep(self, all_gpus: bool) -> int:
        swept = 0
        for folder in self._gpu_folders(all_gpus):
            with self._writing(folder):
                swept += sweep(folder)
        return swept

    def _discard(self, entries: list[Entry]) -> None:
        for entry in entries:
            with self._writing(entry.path.parent):
                discard(entry.path)

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Excludes every other writer of a GPU's folder; turns `OSError` inside into `CacheError`."""
        try:
            _make_own(folder)
            with file_lock(folder / "write.lock", WRITE_WAIT_SECONDS) as held:
                if not held:
                    waited = f"another process has been writing for {WRITE_WAIT_SECONDS:.0f} s"
                    raise TimeoutError(errno.ETIMEDOUT, waited)
                yield
        except OSError as error:
            raise self._error("written", error) from error

    def _enter_lock(self, stack: ExitStack, path: Path, cancelled: Callable[[], bool], timeout_seconds: float) -> bool:
        lock_file = path.with_suffix(".lock")
        try:
            _make_own(path.parent)
            if stack.enter_context(file_lock(lock_file, 0)):
                return True
            _log.info("Waiting for another process that builds the same engine (%s).", path.name[:12])
            held = stack.enter_context(file_lock(lock_file, timeout_seconds, cancelled))
        except OSError as error:
            _log.debug("No lock in %s (%s): building aside.", path.parent, error)
            return False
        if not held:
            _stop_or_build_aside(cancelled, timeout_seconds)
        return held

    def _error(self, verb: str, error: OSError) -> CacheError:
        fix = f"Let this user read and write that folder, or set {FOLDER_VARIABLE} to another one."
        if error.errno in _FULL:
            fix = f"Free space on its disk, or set {FOLDER_VARIABLE} to a folder on another disk."
        what = f"The engine cache {self.folder} cannot be {verb}: {error.strerror or error}."
        return CacheError(what, fix=fix)


def _stop_or_build_aside(cancelled: Callable[[], bool], timeout_seconds: float) -> None:
    if cancelled():
        what = "Cancelled while another process was building the same engine."
        raise BuildCancelled(what, fix="Run again to continue.")
    _log.warning("Another process builds the same engine for over %.0f s: building aside.", timeout_seconds)


def _make_own(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not is_real_folder(folder):
        raise NotADirectoryError(errno.ENOTDIR, f"{folder.name} in it is a link", str(folder))
