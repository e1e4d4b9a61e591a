"""One entry of the engine cache on disk: read with every check, written whole, removed at once."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from . import atomic_files
from .engine_manifest import DIGEST, MANIFEST, Manifest, Payload, UnusableError
from .errors import CacheError

_UPDATED = re.compile(r".+\.[0-9a-f]{16}")
_MOST_UPDATES = 100
"""Updates that one read outlasts; each takes a writer two disk syncs, so nobody comes near in practice."""
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored entry as it was when looked up; `last_used` in seconds since 1970."""

    path: Path
    manifest: Manifest
    last_used: float

    @property
    def digest(self) -> str:
        return self.path.name

    @property
    def info(self) -> Mapping[str, Any]:
        return self.manifest.info

    @property
    def size_bytes(self) -> int:
        return self.manifest.size_bytes

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.payloads

    def read(self, name: str) -> bytes:
        """The verified bytes of payload `name`; `KeyError` if it has none, `CacheError` if lost since."""
        payload = self.manifest.payloads[name]
        try:
            return read_payload(self.path, payload)
        except UnusableError:
            return self._read_again(name)

    def _read_again(self, name: str) -> bytes:
        """The payload after another process has updated or replaced this entry."""
        try:
            return _settled(self.path, lambda: _read_current(self.path, name))
        except UnusableError as error:
            what = f"The cached engine {self.path} was lost while in use: {error}."
            raise CacheError(what, fix="Run again to build it anew.") from error


# -- reading


def load_entry(path: Path) -> Entry | None:
    """The entry in `path`, payload sizes checked; None if there is none; `UnusableError` with the reason."""
    return _settled(path, lambda: _load(path))


def load_verified(path: Path) -> Entry | None:
    """`load_entry` with the sha256 of each payload checked too."""
    return _settled(path, lambda: _load_verified(path))


def _settled(path: Path, read: Callable[[], _Read]) -> _Read:
    """What `read` gives once the manifest stands still: an update under a reader's feet looks like damage."""
    for _ in range(_MOST_UPDATES):
        before = _manifest_bytes(path)
        try:
            return read()
        except UnusableError:
            if _manifest_bytes(path) == before:
                raise
    return read()


def _manifest_bytes(path: Path) -> bytes | None:
    try:
        return atomic_files.read_regular(path / MANIFEST)
    except OSError:
        return None


def _load(path: Path) -> Entry | None:
    if not os.path.lexists(path):
        return None
    if not atomic_files.is_real_folder(path) or not atomic_files.is_real_folder(path.parent):
        raise UnusableError("it is a link or a file where a folder belongs", ours=False)
    try:
        data = atomic_files.read_regular(path / MANIFEST)
        last_used = (path / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnusableError(f"its manifest cannot be read ({error.strerror})", ours=False) from error
    manifest = Manifest.decode(data)
    _check_place(path, manifest)
    return Entry(path, manifest, last_used)


def _load_verified(path: Path) -> Entry | None:
    entry = _load(path)
    for payload in entry.manifest.payloads.values() if entry else ():
        read_payload(path, payload)
    return entry


def _read_current(path: Path, name: str) -> bytes:
    entry = _load(path)
    if entry is None or name not in entry:
        raise UnusableError("it was deleted")
    return read_payload(path, entry.manifest.payloads[name])


def read_payload(path: Path, payload: Payload) -> bytes:
    """The verified bytes of a payload of the entry in `path`; raises `UnusableError` with the reason."""
    try:
        data = atomic_files.read_regular(path / payload.file)
    except OSError as error:
        raise UnusableError(f"{payload.file} cannot be read ({error.strerror})") from error
    if reason := payload.why_not(data):
        raise UnusableError(reason)
    return data


def entry_folders(gpu_folder: Path) -> list[Path]:
    """Everything in a GPU's folder that is named like an entry."""
    return [gpu_folder / name for name in sorted(os.listdir(gpu_folder)) if DIGEST.fullmatch(name)]


def _check_place(path: Path, manifest: Manifest) -> None:
    if manifest.digest != path.name:
        raise UnusableError("its manifest belongs to another engine")
    for payload in manifest.payloads.values():
        try:
            seen = (path / payload.file).lstat()
        except OSError as error:
            raise UnusableError(f"{payload.file} cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(seen.st_mode) or seen.st_size != payload.size:
            raise UnusableError(f"{payload.file} is no file of {payload.size} bytes")


# -- writing: the caller excludes other writers


def write_entry(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Stores an entry at `path`, whole or not at all; what was there goes."""
    staging = atomic_files.temporary(path.parent)
    try:
        staging.mkdir()
        for name, data in {**files, MANIFEST: manifest.encode()}.items():
            atomic_files.write_synced(staging / name, data)
        atomic_files.sync_folder(staging)
        _move_in(staging, path)
    except BaseException:
        with suppress(OSError):
            atomic_files.remove_flat(staging)
        raise


def update_payload(entry: Entry, name: str, data: bytes) -> Entry:
    """`entry` with one payload new: first a file of its own name, then the manifest that points to it."""
    payload = Payload.of(name, data)
    payload = replace(payload, file=f"{name}.{payload.sha256[:16]}")
    before = entry.manifest.payloads.get(name)
    if before is not None and before.sha256 == payload.sha256:
        return entry
    manifest = replace(entry.manifest, payloads={**entry.manifest.payloads, name: payload})
    atomic_files.write_atomic(entry.path / payload.file, data)
    atomic_files.write_atomic(entry.path / MANIFEST, manifest.encode())
    if before is not None:
        with suppress(OSError):  # a reader may hold it open on Windows; the next sweep takes it
            (entry.path / before.file).unlink()
    return replace(entry, manifest=manifest)


def discard(path: Path) -> None:
    """Deletes an entry: it vanishes in one step and its files follow."""
    doomed = atomic_files.temporary(path.parent)
    with suppress(FileNotFoundError):
        atomic_files.replace(path, doomed)
        atomic_files.remove_flat(doomed)


def sweep_entry(entry: Entry) -> int:
    """Deletes what a killed update left in an entry's folder; how many files."""
    named = {payload.file for payload in entry.manifest.payloads.values()}
    left = [
        name
        for name in os.listdir(entry.path)
        if name not in named and (_UPDATED.fullmatch(name) or atomic_files.TEMPORARY.fullmatch(name))
    ]
    for name in left:
        atomic_files.remove_flat(entry.path / name)
    return len(left)


def _move_in(staging: Path, path: Path) -> None:
    displaced = atomic_files.temporary(path.parent)
    if os.path.lexists(path):
        if not atomic_files.is_real_folder(path):
            raise FileExistsError(errno.EEXIST, f"{path.name} in it is no folder of the cache", str(path))
        atomic_files.replace(path, displaced)
    atomic_files.replace(staging, path)
    atomic_files.sync_folder(path.parent)
    atomic_files.remove_flat(displaced)
