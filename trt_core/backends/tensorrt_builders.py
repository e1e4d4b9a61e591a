"""Builder processes: start them, hand out requests, collect plans, kill them on cancel."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import errors
from ..errors import BuildFailed, TRTError
from ..flux.architecture import FluxArchitecture
from .base import Request
from .tensorrt_worker import describe

_LOG = logging.getLogger("trt_core.tensorrt")
_CORE = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.05

# `-c` instead of `-m` with PYTHONPATH: Windows' embedded Python, which ComfyUI ships with, ignores that variable.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from {package}.backends.tensorrt_worker import main; main()"


class Builders:
    """Processes that build engines beside this one. Use as a context manager; leaving it kills what still runs."""

    def __init__(self, arch: FluxArchitecture, device: torch.device, processes: int, timing_cache: Path) -> None:
        self._arch, self._device, self._timing_cache = arch, device, timing_cache
        self._folder = tempfile.TemporaryDirectory(prefix="trt_core_build_")
        self._log_path = Path(self._folder.name) / "worker.log"
        self._log_file = self._log_path.open("wb")
        self._jobs: queue.Queue[tuple[int, Request] | None] = queue.Queue()
        self._done: dict[int, bytes | TRTError] = {}
        self._workers = [self._start() for _ in range(processes)]
        self._threads = [
            threading.Thread(target=self._serve, args=(w,), daemon=True, name="trt_core builder") for w in self._workers
        ]
        for thread in self._threads:
            thread.start()
        self._submitted = 0

    def __enter__(self) -> Builders:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, request: Request) -> int:
        """Queues a build and returns its ticket."""
        ticket = self._submitted
        self._submitted += 1
        self._jobs.put((ticket, request))
        return ticket

    def result(self, ticket: int) -> bytes | None:
        """The plan, or None while it is being built; raises what the build raised."""
        outcome = self._done.get(ticket)
        if isinstance(outcome, TRTError):
            raise outcome
        return outcome

    def finished(self, tickets: list[int]) -> Iterator[int]:
        """Tickets as they finish, and `-1` in every poll that brings none, so that the caller can look for a cancel."""
        waiting = list(tickets)
        while waiting:
            ready = [ticket for ticket in waiting if ticket in self._done]
            for ticket in ready:
                waiting.remove(ticket)
                yield ticket
            if not ready:
                yield -1
                time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
        for _ in self._threads:
            self._jobs.put(None)
        self._log_file.close()
        # Windows keeps a killed process's files open for a moment; the system's temporary folder is swept anyway.
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _START.format(package=_CORE.name), str(_CORE.parent)]
        # Thread pools for 2 to 6 s of tracing would only take cores from Inductor, which compiles at the same time.
        # Few arenas: a builder's many threads would each keep freed memory of their own.
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"}
        environment = {**os.environ, **threads}
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
            env=environment,
        )

    def _serve(self, worker: subprocess.Popen[str]) -> None:
        while (job := self._jobs.get()) is not None:
            ticket, request = job
            self._done[ticket] = self._build(worker, ticket, request)

    def _build(self, worker: subprocess.Popen[str], ticket: int, request: Request) -> bytes | TRTError:
        output = Path(self._folder.name) / f"{ticket}.plan"
        job = {
            "id": ticket,
            "request": describe(request, self._arch),
            "device": self._device.index or 0,
            "timing_cache": str(self._timing_cache),
            "output": str(output),
        }
        if worker.stdin is None or worker.stdout is None:
            return BuildFailed("The builder process has no pipes.")
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                return BuildFailed(
                    f"The builder process ended while building {request.segment.name.value}: {self._last_words()}",
                    fix='Use backend="inductor", or run again with more free memory.',
                )
            fields = json.loads(answer)
            if "error" in fields:
                return getattr(errors, fields["error"])(fields["what"], fix=fields["fix"])
            return output.read_bytes()
        except OSError as error:
            return BuildFailed(f"The builder process could not be reached: {error}")

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it left no message"
