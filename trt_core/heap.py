"""Memory that was freed but that the C library keeps for later: given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_heap() -> None:
    """Takes 10 ms with glibc; other C libraries have no such call, and nothing happens.

    No garbage collection before it: measured after two compiled blocks, that took 0.4 s and changed nothing (what it
    frees goes to Python's own pools, which stay).
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
