"""One file with this GPU's cache entries, for another machine with the same GPU and versions.

A plain zip without compression: `bundle.json`, then `<digest>/manifest.json` and `<digest>/<payload file>`.
Inductor's code is left out, and refused: it is compiled again where a plan needs it.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import atomic_files
from .engine_cache import EngineCache
from .engine_entry import Entry, read_payload
from .engine_manifest import (
    CODE_KIND,
    DIGEST,
    MANIFEST,
    Manifest,
    UnusableError,
    decode_document,
    is_environment,
    is_file_name,
    sha256,
)
from .errors import CacheError
from .gpu import environment

BUNDLE_FORMAT = "trt_core.bundle"
BUNDLE_SCHEMA = 1
INDEX = "bundle.json"
_LONGEST_TEXT_BYTES = 16 << 20
"""Bound for `bundle.json` and manifests, which are a few KB, so that a forged header costs no memory."""
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, KeyError)
"""What `zipfile` raises for damaged, encrypted and oddly compressed members."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What a bundle holds."""

    entries: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Digests that were stored, digests that were there before, and the bytes stored."""

    added: tuple[str, ...]
    present: tuple[str, ...]
    size_bytes: int


# -- export


def export_bundle(cache: EngineCache, path: Path | str, digests: Collection[str] | None = None) -> ExportReport:
    """Writes this machine's entries, or those of `digests`, to the file `path`, whole or not at all.

    Raises `CacheError` when there is nothing to export, an entry is lost or damaged, or `path` cannot be
    written or holds a file that is no bundle.
    """
    path = Path(path)
    entries = _chosen(cache, digests)
    _check_target(path)
    staging = atomic_files.temporary(path.parent)
    try:
        _write_zip(staging, entries)
        atomic_files.replace(staging, path)
        atomic_files.sync_folder(path.parent)
    except OSError as error:
        what = f"The bundle {path} cannot be written: {error.strerror or error}."
        raise CacheError(what, fix="Choose a folder that exists, can be written and has room.") from error
    finally:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
    return ExportReport(len(entries), sum(entry.size_bytes for entry in entries))


def _chosen(cache: EngineCache, digests: Collection[str] | None) -> list[Entry]:
    here = environment()
    entries = cache.entries()
    portable = [entry for entry in entries if entry.manifest.kind != CODE_KIND]
    if entries and not portable:
        what = f"The engine cache {cache.folder} holds Inductor's code alone, which stays on the machine that made it."
        raise CacheError(what, fix='Make a picture with backend="auto" or "tensorrt": its plan and engines can travel.')
    usable = {entry.digest: entry for entry in portable if entry.manifest.environment == here}
    missing = sorted(set(digests or ()) - set(usable))
    if missing or not usable:
        which = ", ".join(missing) or "of this GPU and versions"
        what = f"The engine cache {cache.folder} has no engine {which}."
        raise CacheError(what, fix="Make a picture first: it builds the engines.")
    return [entry for digest, entry in usable.items() if digests is None or digest in digests]


def _check_target(path: Path) -> None:
    """An export may replace an older bundle and nothing else."""
    if not path.exists():
        return
    try:
        with _opened(path) as bundle:
            bundle.getinfo(INDEX)
    except (CacheError, *_BROKEN_ZIP) as error:
        what = f"{path} exists and is not a bundle of this library, so it is not replaced."
        raise CacheError(what, fix="Choose another file name.") from error


def _write_zip(path: Path, entries: list[Entry]) -> None:
    manifests = {entry.digest: entry.manifest.encode() for entry in entries}
    index = {
        "format": BUNDLE_FORMAT,
        "schema": BUNDLE_SCHEMA,
        "created": time.time(),
        "environment": environment(),
        "entries": {digest: sha256(data) for digest, data in manifests.items()},
    }
    with open(path, "xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as bundle:
            bundle.writestr(INDEX, json.dumps(index, indent=1, sort_keys=True))
            for entry in entries:
                _write_entry(bundle, entry, manifests[entry.digest])
        file.flush()
        os.fsync(file.fileno())


def _write_entry(bundle: zipfile.ZipFile, entry: Entry, manifest: bytes) -> None:
    bundle.writestr(f"{entry.digest}/{MANIFEST}", manifest)
    for payload in entry.manifest.payloads.values():
        try:
            data = read_payload(entry.path, payload)
        except UnusableError as error:
            what = f"The cached engine {entry.path} cannot be exported: {error}."
            raise CacheError(what, fix="Clear the cache, make a picture to build it again, then export.") from error
        bundle.writestr(f"{entry.digest}/{payload.file}", data)


# -- import


def import_bundle(cache: EngineCache, path: Path | str) -> ImportReport:
    """Stores the entries of a bundle that the cache does not have; all are verified before any is stored.

    Raises `CacheError` for a bundle of another GPU or other versions, naming each difference, and for a file
    that is damaged, unsafe, of a newer version or no bundle. A disk that fills up keeps the entries before.
    """
    path = Path(path)
    with _opened(path) as bundle, _refusing(path):
        manifests = _verified_manifests(bundle)
        present = tuple(digest for digest, manifest in manifests.items() if cache.get(manifest.key) is not None)
        added = [digest for digest in manifests if digest not in present]
        for digest in added:
            manifest = manifests[digest]
            cache.put(manifest.key, dict(_payloads(bundle, digest, manifest)), manifest.info)
        return ImportReport(tuple(added), present, sum(manifests[digest].size_bytes for digest in added))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        bundle = zipfile.ZipFile(path)
    except OSError as error:
        what = f"The bundle {path} cannot be read: {error.strerror or error}."
        raise CacheError(what, fix="Check the file's name and place.") from error
    except (ValueError, *_BROKEN_ZIP) as error:
        raise _refusal(path, f"it is truncated or no bundle ({error})") from error
    with bundle:
        yield bundle


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except CacheError:
        raise
    except (UnusableError, OSError, *_BROKEN_ZIP) as error:
        raise _refusal(path, str(error)) from error


def _refusal(path: Path, reason: str) -> CacheError:
    fix = "Copy it again, or export it again with these versions on a machine with this GPU."
    return CacheError(f"{path} was not imported: {reason}.", fix=fix)


def _verified_manifests(bundle: zipfile.ZipFile) -> dict[str, Manifest]:
    """Digest -> manifest of each entry, with environment, member names, sizes and every sha256 checked."""
    index = decode_document(_text(bundle, INDEX), BUNDLE_FORMAT, BUNDLE_SCHEMA)
    entries, made_on = index.get("entries"), index.get("environment")
    if not isinstance(entries, dict) or not entries or not is_environment(made_on):
        raise UnusableError("its list of engines is damaged")
    _check_environment(made_on)
    _check_members(bundle)
    manifests = {digest: _manifest(bundle, digest, expected) for digest, expected in entries.items()}
    _check_complete(bundle, manifests)
    for digest, manifest in manifests.items():
        for _ in _payloads(bundle, digest, manifest):
            pass
    return manifests


def _check_environment(made_on: Mapping[str, str]) -> None:
    here = environment()
    fields = list(dict.fromkeys([*here, *made_on]))
    differing = [
        f"{field}: bundle {made_on.get(field, 'none')}, here {here.get(field, 'none')}"
        for field in fields
        if made_on.get(field) != here.get(field)
    ]
    if differing:
        raise UnusableError(f"it was made for another machine ({'; '.join(differing)})")


def _check_members(bundle: zipfile.ZipFile) -> None:
    names = bundle.namelist()
    if len(set(names)) != len(names):
        raise UnusableError("it holds a file twice")
    for name in names:
        folder, slash, file = name.partition("/")
        inside = DIGEST.fullmatch(folder) and slash and (file == MANIFEST or is_file_name(file))
        if name != INDEX and not inside:
            raise UnusableError(f"it holds {name[:80]!r}, which is no file of a bundle")
        if bundle.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise UnusableError(f"it holds {name!r} compressed, which no bundle does")


def _manifest(bundle: zipfile.ZipFile, digest: str, expected: object) -> Manifest:
    data = _text(bundle, f"{digest}/{MANIFEST}")
    if sha256(data) != expected:
        raise UnusableError(f"the manifest of {digest[:12]} is damaged (sha256 differs)")
    manifest = Manifest.decode(data)
    if manifest.digest != digest or manifest.environment != environment():
        raise UnusableError(f"the manifest of {digest[:12]} belongs to another engine")
    if manifest.kind == CODE_KIND:
        raise UnusableError(f"{digest[:12]} is code that would run here, which no bundle of ours holds")
    return manifest


def _check_complete(bundle: zipfile.ZipFile, manifests: Mapping[str, Manifest]) -> None:
    expected: dict[str, int | None] = {INDEX: None}
    expected |= {f"{digest}/{MANIFEST}": None for digest in manifests}
    for digest, manifest in manifests.items():
        expected |= {f"{digest}/{payload.file}": payload.size for payload in manifest.payloads.values()}
    found = {info.filename: info.file_size for info in bundle.infolist()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise UnusableError(f"it lacks {name}")
        if name not in expected:
            raise UnusableError(f"it holds {name}, which its list does not name")
        if expected[name] not in (None, found[name]):
            raise UnusableError(f"{name} has {found[name]} bytes instead of {expected[name]}")


def _payloads(bundle: zipfile.ZipFile, digest: str, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Payload name and verified bytes, one at a time."""
    for name, payload in manifest.payloads.items():
        data = bundle.read(f"{digest}/{payload.file}")
        if reason := payload.why_not(data):
            raise UnusableError(f"in {digest[:12]}, {reason}")
        yield name, data


def _text(bundle: zipfile.ZipFile, name: str) -> bytes:
    info = bundle.getinfo(name)
    if info.file_size > _LONGEST_TEXT_BYTES or info.compress_type != zipfile.ZIP_STORED:
        raise UnusableError(f"{name} is no description")
    return bundle.read(info)
