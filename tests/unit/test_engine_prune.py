"""What prune and clear delete, in which order, and that nothing foreign goes."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trt_core.engine_cache import EngineCache, EngineKey
from trt_core.engine_entry import Entry, write_entry
from trt_core.engine_manifest import MANIFEST, Manifest
from trt_core.gpu import GpuInfo, environment, gpu_slug

DAY = 86400.0


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def age(entry: Entry, days: float) -> None:
    used = time.time() - days * DAY
    os.utime(entry.path / MANIFEST, (used, used))


def put(cache: EngineCache, name: str, days: float, size: int = 1000) -> EngineKey:
    """An entry of `size` bytes, last used so many days ago."""
    key = EngineKey("engine", {"segment": name})
    age(cache.put(key, {"engine.trt": bytes(size)}, {"segment": name}), days)
    return key


def put_foreign(cache: EngineCache, name: str, made_on: dict[str, str], days: float = 0) -> Entry:
    """An entry as other versions, or another GPU, would have left it in the same cache."""
    key = EngineKey("engine", {"segment": name})
    manifest = replace(Manifest.describe(key, {"engine.trt": bytes(1000)}, {"segment": name}), environment=made_on)
    path = cache.folder / gpu_slug(made_on) / manifest.digest
    path.parent.mkdir(parents=True, exist_ok=True)
    write_entry(path, manifest, {"engine.trt": bytes(1000)})
    entry = Entry(path, manifest, manifest.created)
    age(entry, days)
    return entry


def names(cache: EngineCache) -> list[str]:
    return [entry.info["segment"] for entry in cache.entries(all_gpus=True)]


def test_entries_are_sorted_by_last_use(cache: EngineCache) -> None:
    keys = {name: put(cache, name, days) for name, days in (("b", 2), ("c", 3), ("a", 1))}
    assert names(cache) == ["a", "b", "c"]
    assert cache.get(keys["c"]) is not None
    assert names(cache) == ["c", "a", "b"]


def test_prune_without_limits_keeps_all(cache: EngineCache) -> None:
    put(cache, "a", 1000)
    report = cache.prune()
    assert (report.removed, report.kept, report.kept_bytes, report.leftovers) == (0, 1, 1000, 0)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(3000, ["a", "b", "c"]), (2999, ["a", "b"]), (2000, ["a", "b"]), (1, []), (0, [])],
)
def test_prune_by_size_takes_the_least_recently_used(cache: EngineCache, limit: int, kept: list[str]) -> None:
    for name, days in (("b", 2), ("c", 3), ("a", 1)):
        put(cache, name, days)
    report = cache.prune(max_bytes=limit)
    assert names(cache) == kept
    assert (report.removed, report.removed_bytes) == (3 - len(kept), 1000 * (3 - len(kept)))
    assert report.kept_bytes == 1000 * len(kept)


def test_prune_by_age(cache: EngineCache) -> None:
    for name, days in (("a", 1), ("b", 29), ("c", 31)):
        put(cache, name, days)
    assert cache.prune(max_age_days=30).removed == 1
    assert names(cache) == ["a", "b"]
    assert cache.prune(max_bytes=1000, max_age_days=30).removed == 1
    assert names(cache) == ["a"]


def test_entries_of_other_versions_go_first(cache: EngineCache) -> None:
    put(cache, "mine, old", 100)
    put_foreign(cache, "other torch", {**environment(), "torch": "0.1"})
    put_foreign(cache, "other gpu", environment(GpuInfo("NVIDIA X1", (8, 9), 1, "1.0")), days=1)
    assert cache.prune(max_bytes=2000).removed == 1
    assert names(cache) == ["other torch", "mine, old"]
    assert cache.prune(max_bytes=1000).removed == 1
    assert names(cache) == ["mine, old"]


def test_other_gpus_are_listed_and_cleared_only_on_demand(cache: EngineCache) -> None:
    put(cache, "mine", 0)
    put_foreign(cache, "other gpu", environment(GpuInfo("NVIDIA X1", (8, 9), 1, "1.0")))
    assert [entry.info["segment"] for entry in cache.entries()] == ["mine"]
    assert cache.clear() == (1, 1000)
    assert names(cache) == ["other gpu"]
    assert cache.clear(all_gpus=True) == (1, 1000)
    assert names(cache) == []


def make_foreign(cache: EngineCache) -> dict[Path, bytes]:
    """Things of other programs and people in and around the cache."""
    mine = cache.folder / gpu_slug(environment())
    files = {
        cache.folder / "notes.txt": b"notes",
        cache.folder / "models" / "a.safetensors": b"weights",
        cache.folder / "models" / ("0" * 64) / MANIFEST: b"{}",
        mine / "notes.txt": b"notes",
        mine / ".tmp-notes": b"notes",
        mine / ("a" * 64) / "weights.bin": b"no manifest here",
        mine / ("b" * 64) / MANIFEST: b'{"format": "of another program"}',
        mine / ("b" * 64) / "blob.bin": b"blob",
        mine / ("c" * 64) / MANIFEST: b'{"format": "trt_core.engine", "schema": 99}',
        mine / "photo.lock": b"x",
    }
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def test_foreign_files_stay(cache: EngineCache) -> None:
    put(cache, "a", 0)
    foreign = make_foreign(cache)
    cache.prune(max_bytes=0)
    cache.clear(all_gpus=True)
    assert {path: path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()} == foreign


def test_leftovers_and_damage_go(cache: EngineCache) -> None:
    damaged = cache.folder / gpu_slug(environment()) / put(cache, "damaged", 0).digest
    put(cache, "good", 0)
    (damaged / MANIFEST).write_bytes(b"torn")
    abandoned = damaged.parent / f".tmp-{'0' * 32}"
    abandoned.mkdir()
    (abandoned / "engine.trt").write_bytes(b"half")
    dead_lock = damaged.parent / f"{'d' * 64}.lock"
    dead_lock.touch()
    report = cache.prune()
    assert (report.removed, report.kept, report.leftovers) == (0, 1, 2)
    assert [path.exists() for path in (damaged, abandoned, dead_lock)] == [False] * 3
    assert names(cache) == ["good"]


def test_prune_leaves_a_held_lock(cache: EngineCache) -> None:
    key = put(cache, "a", 0)
    with cache.lock(key) as alone:
        cache.prune(max_bytes=0)
        assert alone
        assert (cache.folder / gpu_slug(environment()) / f"{key.digest}.lock").exists()
