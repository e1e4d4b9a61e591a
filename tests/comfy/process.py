"""A real ComfyUI server in a process group of its own, from an empty base folder, on a free loopback port."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

CPU_FLAGS = ("--cpu", "--use-pytorch-cross-attention")
START_SECONDS = 300
STOP_SECONDS = 20


class ServerStartError(RuntimeError):
    """ComfyUI ended or did not answer; the message ends with its log's last lines."""


class ServerProcess:
    """Started by `start`, ended surely by `stop`. Everything it writes is below `base`, its log in `log`."""

    def __init__(self, checkout: Path, python: Path, base: Path, *, flags: Sequence[str] = CPU_FLAGS) -> None:
        self.checkout, self.python, self.base, self.flags = checkout, python, base, tuple(flags)
        self.models = base / "models"
        self.log = base / "server.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def link_packs(self, packs: Mapping[str, Path]) -> None:
        """Each pack's folder, linked into custom_nodes under its name."""
        folder = self.base / "custom_nodes"
        folder.mkdir(parents=True, exist_ok=True)
        for name, pack in packs.items():
            (folder / name).symlink_to(pack, target_is_directory=True)

    def start(self) -> None:
        """Returns when the server answers; raises `ServerStartError` with the end of its log."""
        self.models.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(port),
                cwd=self.base,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """End the whole process group: asked first, killed after `STOP_SECONDS`."""
        process, self._process = self._process, None
        if process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, how)
                process.wait(STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _command(self, port: int) -> list[str]:
        return [
            *(str(self.python), "-s", str(self.checkout / "main.py"), *self.flags),
            *("--listen", "127.0.0.1", "--port", str(port)),
            *("--base-directory", str(self.base), "--models-directory", str(self.models)),
            *("--database-url", "sqlite:///:memory:", "--disable-api-nodes"),
        ]

    def _environment(self) -> dict[str, str]:
        """On a CPU one thread, unless the caller sets it: on busy cores threads mostly wait for each other."""
        return ({"OMP_NUM_THREADS": "1"} if "--cpu" in self.flags else {}) | os.environ

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.running():
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.2)
        self.stop()
        raise ServerStartError(f"ComfyUI did not answer at {self.url}:\n" + self.log_text()[-4000:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if sys.platform == "linux":
    _libc = ctypes.CDLL(None)  # loaded before the fork


def _end_with_parent() -> None:
    """The kernel ends the server when the tests' process is gone, even killed, when no fixture can."""
    pr_set_pdeathsig = 1
    _libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
