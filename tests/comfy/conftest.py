"""One real ComfyUI server for the whole tier, and small FLUX files in its models folder.

COMFYUI_PATH (default ~/ComfyUI) and COMFYUI_PYTHON (default ~/comfy-venv/bin/python) say which ComfyUI;
COMFYUI_FLAGS replaces the flags that make it run on a CPU.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfy.models import write_models
from tests.comfy.process import CPU_FLAGS, ServerProcess
from tests.comfy.server import Server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HOW_TO_GET_IT = (
    "comfy tier skipped, no {missing}: git clone https://github.com/Comfy-Org/ComfyUI ~/ComfyUI and make "
    "~/comfy-venv from its requirements.txt, or set COMFYUI_PATH and COMFYUI_PYTHON"
)


def checkout_and_python() -> tuple[Path, Path]:
    checkout = os.environ.get("COMFYUI_PATH", "~/ComfyUI")
    python = os.environ.get("COMFYUI_PYTHON", "~/comfy-venv/bin/python")
    return Path(checkout).expanduser(), Path(python).expanduser()


def missing() -> Path | None:
    checkout, python = checkout_and_python()
    return next((needed for needed in (checkout / "main.py", python) if not needed.is_file()), None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Said once, where a skip of every test would say it in every line."""
    if missing() is not None:
        terminalreporter.write_line(HOW_TO_GET_IT.format(missing=missing()), yellow=True)


@pytest.fixture(scope="session")
def comfyui() -> tuple[Path, Path]:
    """The checkout and its Python; without them, every test that needs them is skipped."""
    if missing() is not None:
        pytest.skip("no ComfyUI")
    return checkout_and_python()


@pytest.fixture(scope="session")
def server_process(comfyui: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The running server, with this repository as a pack (once it is one) and the test nodes linked in."""
    flags = shlex.split(os.environ["COMFYUI_FLAGS"]) if "COMFYUI_FLAGS" in os.environ else CPU_FLAGS
    process = ServerProcess(*comfyui, tmp_path_factory.mktemp("comfyui"), flags=flags)
    packs = {"test_pack": HERE / "test_pack"}
    if (ROOT / "__init__.py").is_file():
        packs["trt-lora-flux"] = ROOT
    process.link_packs(packs)
    write_models(process.models)
    try:
        process.start()
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="session")
def server(server_process: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(server_process.url, tmp_path_factory.mktemp("results"))
