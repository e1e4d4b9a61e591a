"""Forked processes for tests that kill one or take its rights away: a fork costs no second import of torch."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

forks = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="needs fork, after which CUDA cannot be used"
)


class Child:
    """A forked process that runs `work` and sends what it returns; it never runs pytest's own exit code."""

    def __init__(self, work: Callable[[Callable[[str], None]], str]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, lambda text: os.write(writer, text.encode() + b"\n"))
        os.close(writer)
        self._lines = os.fdopen(reader)

    def line(self) -> str:
        return self._lines.readline().strip()

    def end(self, signal_number: int | None = None) -> int:
        """Kills the child if asked; its wait status."""
        if signal_number is not None:
            os.kill(self.pid, signal_number)
        self._lines.close()
        return os.waitpid(self.pid, 0)[1]


def _run(work: Callable[[Callable[[str], None]], str], send: Callable[[str], object]) -> None:
    try:
        send(work(send))
    except BaseException as error:
        send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)
