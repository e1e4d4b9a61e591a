"""What the cache stores, what it refuses, and that damage is a miss that is said once."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_core.engine_cache import EngineCache, EngineKey, default_folder
from trt_core.engine_manifest import MANIFEST
from trt_core.errors import CacheError
from trt_core.gpu import environment, gpu_slug

KEY = EngineKey("engine", {"segment": "double_qkv", "tokens": [256, 4096, 16384], "dtype": "bfloat16"})
FILES = {"engine.trt": bytes(range(256)) * 40, "plan.json": b"{}"}
INFO = {"segment": "double_qkv", "img_tokens": 4096}


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def contents(cache: EngineCache, key: EngineKey = KEY) -> dict[str, bytes] | None:
    entry = cache.get(key)
    return entry and {name: entry.read(name) for name in entry.manifest.payloads}


def test_round_trip(cache: EngineCache) -> None:
    assert cache.get(KEY) is None
    stored = cache.put(KEY, FILES, INFO)
    found = EngineCache(cache.folder).get(KEY)
    assert found is not None
    assert {name: found.read(name) for name in FILES} == FILES
    assert (found.path, found.info, found.manifest.key) == (stored.path, INFO, KEY)
    assert found.path == cache.folder / gpu_slug(environment()) / KEY.digest
    assert found.size_bytes == sum(map(len, FILES.values()))
    assert sorted(os.listdir(found.path)) == ["engine.trt", "manifest.json", "plan.json"]
    assert "engine.trt" in found
    assert "runtime_cache.bin" not in found


def test_manifest_is_readable_json(cache: EngineCache) -> None:
    document = json.loads((cache.put(KEY, FILES, INFO).path / MANIFEST).read_text())
    assert document["environment"] == environment()
    assert document["fields"] == KEY.fields
    assert document["payloads"]["engine.trt"]["size"] == len(FILES["engine.trt"])


@pytest.mark.parametrize(
    "other",
    [
        EngineKey("plan", KEY.fields),
        EngineKey("engine", {**KEY.fields, "dtype": "float16"}),
        EngineKey("engine", {**KEY.fields, "fp8": True}),
        EngineKey("engine", {**KEY.fields, "tokens": [256, 4096, 16385]}),
    ],
)
def test_every_field_is_in_the_key(cache: EngineCache, other: EngineKey) -> None:
    cache.put(KEY, FILES, INFO)
    assert cache.get(other) is None


def test_key_is_what_json_holds() -> None:
    fields = {"b": (1, 2), "a": {"x": 1.5}}
    key = EngineKey("engine", fields)
    fields["c"] = 1
    assert key == EngineKey("engine", {"a": {"x": 1.5}, "b": [1, 2]})
    assert hash(key) == hash(EngineKey("engine", {"a": {"x": 1.5}, "b": [1, 2]}))
    with pytest.raises(ValueError, match="JSON"):
        EngineKey("engine", {"scale": float("nan")})


@pytest.mark.parametrize("name", ["", "../engine.trt", "a/b", "Engine.trt", MANIFEST, "a" * 65, ".hidden", "a\\b"])
def test_payload_names_are_plain(cache: EngineCache, name: str) -> None:
    with pytest.raises(ValueError, match="payload name"):
        cache.put(KEY, {name: b"x"}, {})
    cache.put(KEY, FILES, INFO)
    with pytest.raises(ValueError, match="payload name"):
        cache.update(KEY, name, b"x")


def test_put_again_replaces(cache: EngineCache) -> None:
    cache.put(KEY, FILES, INFO)
    cache.put(KEY, {"engine.trt": b"new"}, {})
    assert contents(cache) == {"engine.trt": b"new"}
    assert len(os.listdir(cache.folder / gpu_slug(environment()))) == 1


def test_update_adds_and_replaces_one_payload(cache: EngineCache) -> None:
    path = cache.put(KEY, FILES, INFO).path
    for data in (b"first", b"second, longer", b"second, longer", b""):
        cache.update(KEY, "runtime_cache.bin", data)
        assert contents(cache) == {**FILES, "runtime_cache.bin": data}
        assert len(os.listdir(path)) == len(FILES) + 2


def test_update_needs_an_entry(cache: EngineCache) -> None:
    with pytest.raises(CacheError, match="lost its entry"):
        cache.update(KEY, "runtime_cache.bin", b"x")


def test_entry_follows_updates_and_reports_loss(cache: EngineCache) -> None:
    cache.put(KEY, {"engine.trt": b"old"}, {})
    entry = cache.get(KEY)
    assert entry is not None
    cache.update(KEY, "engine.trt", b"newer")
    assert entry.read("engine.trt") == b"newer"
    cache.clear()
    with pytest.raises(CacheError, match=r"lost while in use.*Run again"):
        entry.read("engine.trt")
    with pytest.raises(KeyError):
        entry.read("no_such.bin")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def link_outside(path: Path) -> None:
    outside = path.parent.parent.parent.parent / "outside.bin"
    path.replace(outside)
    path.symlink_to(outside)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "payload flipped": lambda entry: flip(entry / "engine.trt"),
    "payload truncated": lambda entry: truncate(entry / "engine.trt"),
    "payload missing": lambda entry: (entry / "engine.trt").unlink(),
    "payload a link": lambda entry: link_outside(entry / "engine.trt"),
    "payload a folder": lambda entry: ((entry / "engine.trt").unlink(), (entry / "engine.trt").mkdir()),
    "manifest truncated": lambda entry: truncate(entry / MANIFEST),
    "manifest empty": lambda entry: (entry / MANIFEST).write_bytes(b""),
    "manifest binary": lambda entry: (entry / MANIFEST).write_bytes(bytes(range(256))),
    "manifest deep": lambda entry: (entry / MANIFEST).write_text("[" * 100_000),
    "manifest a list": lambda entry: (entry / MANIFEST).write_text("[]"),
    "manifest infinite": lambda entry: (entry / MANIFEST).write_text('{"created": 1e999}'),
    "manifest a link": lambda entry: link_outside(entry / MANIFEST),
    "other format": lambda entry: edit(entry / MANIFEST, format="something else"),
    "newer schema": lambda entry: edit(entry / MANIFEST, schema=2),
    "odd schema": lambda entry: edit(entry / MANIFEST, schema=None),
    "no fields": lambda entry: edit(entry / MANIFEST, fields=None),
    "no payloads": lambda entry: edit(entry / MANIFEST, payloads=[]),
    "kind changed": lambda entry: edit(entry / MANIFEST, kind="plan"),
    "other machine": lambda entry: edit(entry / MANIFEST, environment={**environment(), "torch": "0.1"}),
    "odd environment": lambda entry: edit(entry / MANIFEST, environment={"gpu": 1}),
    "negative size": lambda entry: edit(
        entry / MANIFEST, payloads={"engine.trt": {"file": "engine.trt", "size": -1, "sha256": ""}}
    ),
    "path escapes": lambda entry: edit(
        entry / MANIFEST, payloads={"engine.trt": {"file": "../../x", "size": 1, "sha256": ""}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_a_miss_said_once_and_repaired(
    cache: EngineCache, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    entry = cache.put(KEY, FILES, INFO).path
    cache.update(KEY, "plan.json", b"[]")
    damage(entry)
    with caplog.at_level(logging.WARNING, logger="trt_core.cache"):
        assert cache.get(KEY) is None
        assert EngineCache(cache.folder).get(KEY) is None
    assert len(caplog.records) == 1
    assert "built again" in caplog.text
    cache.put(KEY, FILES, INFO)
    assert contents(cache) == FILES


def test_payload_link_is_left_alone(cache: EngineCache, tmp_path: Path) -> None:
    link_outside(cache.put(KEY, FILES, INFO).path / "engine.trt")
    cache.put(KEY, FILES, INFO)
    cache.clear()
    assert (tmp_path / "outside.bin").read_bytes() == FILES["engine.trt"]


@pytest.mark.parametrize("level", ["entry", "gpu"])
def test_links_out_of_the_folder_are_not_followed(cache: EngineCache, tmp_path: Path, level: str) -> None:
    entry = cache.put(KEY, FILES, INFO).path
    moved = entry if level == "entry" else entry.parent
    outside = tmp_path / "outside"
    moved.rename(outside)
    moved.symlink_to(outside, target_is_directory=True)
    before = sorted(path for path in outside.rglob("*"))
    assert cache.get(KEY) is None
    with pytest.raises(CacheError, match="cannot be written"):
        cache.put(KEY, FILES, INFO)
    with cache.lock(KEY):
        cache.clear(all_gpus=True)
        cache.prune(max_bytes=0)
        assert sorted(path for path in outside.rglob("*")) == before


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    cache = EngineCache(tmp_path / "file")
    assert cache.get(KEY) is None
    with pytest.raises(CacheError, match=r"file cannot be written.*TRT_CORE_CACHE"):
        cache.put(KEY, FILES, INFO)
    with pytest.raises(CacheError, match="cannot be read"):
        cache.entries()
    with cache.lock(KEY) as alone:
        assert not alone
    assert (tmp_path / "file").read_text() == "mine"


def test_looking_creates_nothing(cache: EngineCache) -> None:
    assert cache.get(KEY) is None
    assert cache.entries() == []
    assert cache.clear() == (0, 0)
    assert not cache.folder.exists()


def test_locks_leave_no_file(cache: EngineCache) -> None:
    with cache.lock(KEY) as alone:
        assert alone
        cache.put(KEY, FILES, INFO)
    assert [path.name for path in (cache.folder / gpu_slug(environment())).iterdir()] == [KEY.digest]


def test_lock_excludes_threads_for_one_key_only(cache: EngineCache) -> None:
    other = EngineKey("engine", {"segment": "single"})
    seen: dict[str, bool] = {}

    def try_both() -> None:
        for name, key in (("same", KEY), ("other", other)):
            with cache.lock(key, timeout_seconds=0.05) as alone:
                seen[name] = alone

    with cache.lock(KEY):
        thread = threading.Thread(target=try_both)
        thread.start()
        thread.join()
    assert seen == {"same": False, "other": True}


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("TRT_CORE_CACHE", "~/elsewhere")
    assert default_folder() == Path.home() / "elsewhere"
    monkeypatch.setenv("TRT_CORE_CACHE", "")
    assert EngineCache().folder == default_folder() == tmp_path / "trt_core"
    monkeypatch.setenv(variable, "relative")
    assert default_folder() == Path.home() / ".cache" / "trt_core"
