"""What was freed while compiling goes back to the system."""

from __future__ import annotations

import os
import sys

import pytest

from trt_core import heap
from trt_core.heap import give_back_heap

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc is on Linux")


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
