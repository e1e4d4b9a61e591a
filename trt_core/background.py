"""Long work beside a caller that must stay able to cancel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from .host import Progress, stop_if_cancelled

_T = TypeVar("_T")
_POLL_SECONDS = 0.05


def run_cancellable(work: Callable[[], _T], progress: Progress, stage: str) -> _T:
    """What `work` returns, computed in a thread; raises `BuildCancelled` at once when the user cancels.

    A compiler cannot be stopped from outside: after a cancel the thread ends by itself and its result is dropped.
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
    while thread.is_alive():
        stop_if_cancelled(progress, stage)
        thread.join(_POLL_SECONDS)
    if failure:
        raise failure[0]
    return outcome[0]


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
