"""The cache between processes: races and kill -9, for real."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.forked import Child, forks
from trt_core.atomic_files import file_lock
from trt_core.engine_cache import EngineCache, EngineKey
from trt_core.errors import BuildCancelled
from trt_core.gpu import environment, gpu_slug

ROOT = Path(__file__).resolve().parents[2]
KEY = EngineKey("engine", {"segment": "double_qkv"})
BUILDER = """
import os, sys, time
from pathlib import Path
from tests.unit.forked import Child, forks
from trt_core.atomic_files import file_lock
from trt_core.engine_cache import EngineCache, EngineKey
from trt_core.gpu import environment

folder, log = map(Path, sys.argv[1:])
cache, key = EngineCache(folder), EngineKey("engine", {"segment": "double_qkv"})
environment()
print("ready", flush=True)
sys.stdin.readline()
alone = True
if cache.get(key) is None:
    with cache.lock(key) as alone:
        if cache.get(key) is None:
            with open(log, "a") as builds:
                builds.write("built\\n")
            time.sleep(0.3)
            cache.put(key, {"engine.trt": os.urandom(100_000)}, {})
print(alone, cache.get(key).manifest.payloads["engine.trt"].sha256, flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    environment()  # before forks: a child must not import torch
    return EngineCache(tmp_path / "cache")


def gpu_folder(cache: EngineCache) -> Path:
    return cache.folder / gpu_slug(environment())


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


def test_two_processes_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "cache"), str(tmp_path / "log")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n", "ready\n"]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
    assert said[0] == said[1]
    assert said[0][0] == "True"


@forks
def test_lock_of_a_killed_process_is_free(cache: EngineCache) -> None:
    def hold(send: Callable[[str], None]) -> str:
        with cache.lock(KEY) as alone:
            send(f"held {alone}")
            time.sleep(60)
        return "let go"

    child = Child(hold)
    assert child.line() == "held True"
    with cache.lock(KEY, timeout_seconds=0.1) as alone:
        assert not alone
    with pytest.raises(BuildCancelled, match="another process"), cache.lock(KEY, cancelled=lambda: True):
        pytest.fail("the wait was cancelled")
    child.end(signal.SIGKILL)
    with cache.lock(KEY, timeout_seconds=5) as alone:
        assert alone


@forks
def test_waiting_ends_when_the_other_has_built(cache: EngineCache) -> None:
    def build(send: Callable[[str], None]) -> str:
        with cache.lock(KEY):
            send("locked")
            time.sleep(0.3)
            cache.put(KEY, {"engine.trt": b"theirs"}, {})
        return "built"

    child = Child(build)
    assert child.line() == "locked"
    with cache.lock(KEY) as alone:
        entry = cache.get(KEY)
        assert alone
        assert entry is not None
        assert entry.read("engine.trt") == b"theirs"
    assert child.line() == "built"
    child.end()


@forks
def test_lock_excludes_while_its_file_comes_and_goes(tmp_path: Path) -> None:
    """Each holder deletes the lock file when it lets go: nobody may hold a deleted one beside a new one."""
    counter, lock = tmp_path / "counter", tmp_path / "lock"
    counter.write_text("0")

    def count(_: Callable[[str], None]) -> str:
        done = 0
        while done < 400:
            with file_lock(lock, 0) as held:
                if held:
                    counter.write_text(str(int(counter.read_text()) + 1))
                    done += 1
        return "counted"

    children = [Child(count) for _ in range(4)]
    assert [child.line() for child in children] == ["counted"] * 4
    assert [child.end() for child in children] == [0] * 4
    assert counter.read_text() == "1600"


@forks
def test_kill_while_writing_leaves_nothing_visible(cache: EngineCache) -> None:
    payload = os.urandom(16 << 20)

    def write(send: Callable[[str], None]) -> str:
        send("ready")
        cache.put(KEY, {f"part{number}.bin": payload for number in range(16)}, {})
        return "finished"

    child = Child(write)
    assert child.line() == "ready"
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in cache.folder.rglob("part*")):
        assert time.monotonic() < deadline
    assert os.WTERMSIG(child.end(signal.SIGKILL)) == signal.SIGKILL
    assert len(temporaries(cache.folder)) == 1
    assert cache.get(KEY) is None
    assert cache.entries() == []
    assert cache.prune().leftovers == 1
    assert temporaries(cache.folder) == []
    cache.put(KEY, {"engine.trt": b"whole"}, {})
    assert cache.get(KEY) is not None


@forks
def test_kill_while_updating_keeps_the_old_or_the_new(cache: EngineCache) -> None:
    cache.put(KEY, {"engine.trt": b"plan", "state.bin": bytes(100_000)}, {})

    def update(send: Callable[[str], None]) -> str:
        for number in range(1, 100_000):
            cache.update(KEY, "state.bin", bytes([number % 256]) * 100_000)
            if number == 1:
                send("started")
        return "finished"

    chance = random.Random(0)
    for _ in range(12):
        child = Child(update)
        assert child.line() == "started"
        time.sleep(chance.uniform(0, 0.05))
        assert os.WTERMSIG(child.end(signal.SIGKILL)) == signal.SIGKILL
        entry = cache.get(KEY)
        assert entry is not None
        state = entry.read("state.bin")
        assert state == state[:1] * 100_000
        assert entry.read("engine.trt") == b"plan"
    cache.prune()
    assert sorted(path.name for path in gpu_folder(cache).iterdir()) == [KEY.digest]
    assert len(list((gpu_folder(cache) / KEY.digest).iterdir())) == 3


@forks
def test_readers_never_see_a_torn_entry(cache: EngineCache) -> None:
    cache.put(KEY, {"state.bin": bytes(50_000)}, {})

    def update(send: Callable[[str], None]) -> str:
        send("started")
        for number in range(100_000):
            cache.update(KEY, "state.bin", bytes([number % 256]) * 50_000)
        return "finished"

    child = Child(update)
    assert child.line() == "started"
    try:
        for _ in range(100):
            entry = cache.get(KEY)
            assert entry is not None
            state = entry.read("state.bin")
            assert state == state[:1] * 50_000
    finally:
        child.end(signal.SIGKILL)
