"""Long work beside a caller that must stay able to cancel."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from .host import Progress, stop_if_cancelled

_T = TypeVar("_T")
_POLL_SECONDS = 0.05
_STOP_AGAIN_SECONDS = 0.5


class _Stopped(SystemExit):
    """Raised in a thread whose work nobody waits for any more. Threads end on SystemExit without a word."""


def run_cancellable(work: Callable[[], _T], progress: Progress, stage: str) -> _T:
    """What `work` returns, computed in a thread; raises `BuildCancelled` when the user cancels, once the thread ended.

    A compiler is stopped at its next line of Python, as Ctrl-C stops one in the main thread; what C++ does until then
    is waited for. It must not go on beside the caller: PyTorch's tracing replaces `nn.Module.__call__` for all threads,
    and ComfyUI's next run, of another model, failed with "NameError: module is not installed as a submodule".
    Gradients are off inside, as PyTorch keeps that setting per thread.
    """
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            with torch.no_grad():
                outcome.append(work())
        except BaseException as error:
            failure.append(error)

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    thread = threading.Thread(target=_on_device(target, device), daemon=True, name=f"trt_core {stage}")
    thread.start()
    try:
        while thread.is_alive():
            stop_if_cancelled(progress, stage)
            thread.join(_POLL_SECONDS)
    finally:  # after Ctrl-C, too
        _end(thread)
    if failure:
        raise failure[0]
    return outcome[0]


def _end(thread: threading.Thread) -> None:
    """Returns when the thread has ended, which is soon: unless it has, `_Stopped` is raised in it.

    Again after a while: Python drops what is raised in a finalizer or callback (seen in one of eight compilations).
    """
    while thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped))
        thread.join(_STOP_AGAIN_SECONDS)


def _on_device(target: Callable[[], None], device: int | None) -> Callable[[], None]:
    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        target()

    return run


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started
