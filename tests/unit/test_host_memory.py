"""What compiling leaves in host memory goes: Inductor's worker processes, and what was freed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch._dynamo.convert_frame
import torch._inductor.config
from torch._inductor import async_compile

from trt_core import heap
from trt_core.backends.compile_workers import end_compile_workers
from trt_core.heap import give_back_heap

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Inductor has worker processes on Linux")
ENDS_WITHIN_S = 60


@pytest.fixture
def started() -> Iterator[Callable[[], Any]]:
    """Starts workers as a compilation does, and returns their pool."""
    with torch._inductor.config.patch(compile_threads=2):
        yield async_compile.AsyncCompile.process_pool
        async_compile.shutdown_compile_workers()


def ended(pool: Any) -> bool:
    try:
        pool.process.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        return False
    return True


@LINUX
def test_workers_end_and_the_next_compilation_has_new_ones(started: Callable[[], Any]) -> None:
    pool = started()
    assert pool.submit(os.getpid).result(ENDS_WITHIN_S) not in (os.getpid(), pool.process.pid), "a worker of its own"
    end_compile_workers()
    assert ended(pool)
    with torch._dynamo.convert_frame.compile_lock:  # as a compilation does
        again = started()
    assert again is not pool
    assert again.submit(os.getpid).result(ENDS_WITHIN_S) != os.getpid()


@LINUX
def test_workers_that_still_start_are_not_waited_for(started: Callable[[], Any]) -> None:
    pool = started()
    before = time.perf_counter()
    end_compile_workers()
    assert time.perf_counter() - before < 0.1
    assert ended(pool)


@LINUX
def test_another_threads_compilation_keeps_its_workers_until_it_is_done(started: Callable[[], Any]) -> None:
    pool = started()
    compiling, done = threading.Event(), threading.Event()

    def compile_something() -> None:
        with torch._dynamo.convert_frame.compile_lock:
            compiling.set()
            done.wait(ENDS_WITHIN_S)

    thread = threading.Thread(target=compile_something)
    thread.start()
    compiling.wait(ENDS_WITHIN_S)
    end_compile_workers()
    assert pool.submit(os.getpid).result(ENDS_WITHIN_S), "its workers still work"
    assert pool.running
    done.set()
    thread.join()
    assert ended(pool)


@pytest.mark.parametrize("missing", ["shutdown_compile_workers", "_pool_set"])
def test_a_pytorch_with_other_names_keeps_its_workers(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delattr(async_compile, missing)
    monkeypatch.setattr(threading, "Thread", None)
    end_compile_workers()


def test_without_workers_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async_compile.shutdown_compile_workers()
    monkeypatch.setattr(threading, "Thread", None)
    end_compile_workers()


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@LINUX
def test_freed_memory_goes_back_to_the_system() -> None:
    """Every second of many small pieces: glibc cannot give the space between them back by itself."""
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("no glibc")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    count, size = 2000, 64 << 10
    pieces = [libc.malloc(size) for _ in range(count)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces[:-1]:
        libc.free(ctypes.c_void_p(piece))
    before = resident_bytes()
    give_back_heap()
    after = resident_bytes()
    libc.free(ctypes.c_void_p(pieces[-1]))
    assert before - after > count * size / 2


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_elsewhere_nothing_is_called(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(heap.sys, "platform", platform)
    monkeypatch.setattr(heap.ctypes, "CDLL", None)
    give_back_heap()


def test_a_c_library_without_the_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    give_back_heap()
