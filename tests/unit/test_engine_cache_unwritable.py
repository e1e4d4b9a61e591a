"""A cache on a full disk, and one that can only be read, for real."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.forked import Child, forks
from trt_core.engine_cache import EngineCache, EngineKey
from trt_core.errors import CacheError
from trt_core.gpu import environment

KEY = EngineKey("engine", {"segment": "double_qkv"})
NOBODY = 65534


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    environment()  # before forks: a child must not import torch
    return EngineCache(tmp_path / "cache")


@forks
def test_full_disk_is_said_and_leaves_nothing(cache: EngineCache) -> None:
    cache.put(KEY, {"engine.trt": b"old"}, {})

    def fill(send: Callable[[str], None]) -> str:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for write in (
            lambda: cache.put(KEY, {"engine.trt": bytes(100_000)}, {}),
            lambda: cache.update(KEY, "runtime_cache.bin", bytes(100_000)),
        ):
            try:
                write()
            except CacheError as error:
                send(str(error))
        return "went on"

    child = Child(fill)
    for _ in range(2):
        said = child.line()
        assert "too large" in said
        assert "Free space" in said
        assert str(cache.folder) in said
        assert "TRT_CORE_CACHE" in said
    assert child.line() == "went on"
    assert child.end() == 0
    entry = cache.get(KEY)
    assert entry is not None
    assert entry.read("engine.trt") == b"old"
    assert list(cache.folder.rglob(".tmp-*")) == []


@pytest.fixture
def read_only() -> Iterator[EngineCache]:
    """A cache with one entry that the user `nobody` may read and not write; root is never refused."""
    environment()
    folder = Path(tempfile.mkdtemp())
    cache = EngineCache(folder / "cache")
    cache.put(KEY, {"engine.trt": b"plan"}, {})
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield cache
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@forks
def test_read_only_folder_serves_and_refuses(read_only: EngineCache) -> None:
    def use(send: Callable[[str], None]) -> str:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        entry = read_only.get(KEY)
        send(entry.read("engine.trt").decode() if entry else "miss")
        with read_only.lock(KEY) as alone:
            send(f"alone {alone}")
        for refused in (
            lambda: read_only.put(KEY, {"engine.trt": b"new"}, {}),
            lambda: read_only.update(KEY, "engine.trt", b"new"),
            lambda: read_only.clear(),
        ):
            try:
                refused()
            except CacheError as error:
                send(str(error))
        return f"{len(read_only.entries())} entries"

    child = Child(use)
    assert child.line() == "plan"
    assert child.line() == "alone False"
    for _ in range(3):
        said = child.line()
        assert f"{read_only.folder} cannot be written: Permission denied" in said
        assert "TRT_CORE_CACHE" in said
    assert child.line() == "1 entries"
    child.end()
