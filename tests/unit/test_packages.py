"""The version matrix, and the lines that users paste."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trt_core.errors import MissingDependency
from trt_core.packages import (
    RELEASES,
    install_line,
    installed,
    is_rtx,
    torch_requirement,
    torch_tensorrt_requirement,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("gpu_name", "rtx"),
    [
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", True),
        ("NVIDIA GeForce GTX 1660 Ti", True),
        ("NVIDIA RTX A6000", True),
        ("NVIDIA RTX 6000 Ada Generation", True),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", True),
        ("Quadro RTX 8000", True),
        ("GRID RTX6000-24Q", True),
        ("NVIDIA H200", False),
        ("NVIDIA H100 80GB HBM3", False),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("NVIDIA L40S", False),
        ("Tesla T4", False),
    ],
)
def test_cards_that_tensorrt_rtx_is_made_for(gpu_name: str, rtx: bool) -> None:
    assert is_rtx(gpu_name) is rtx


@pytest.mark.parametrize(
    ("torch_version", "gpu_name", "requirement"),
    [
        ("2.11.0+cu130", "NVIDIA GeForce RTX 4090", "torch-tensorrt-rtx==2.11.0"),
        ("2.12.0", "NVIDIA H100 80GB HBM3", "torch-tensorrt==2.12.1"),
        ("2.13.0+cu130", "NVIDIA L40S", "torch-tensorrt==2.13.0"),
        ("2.14.0a0+git1234", "NVIDIA RTX A6000", "torch-tensorrt-rtx==2.14.0"),
    ],
)
def test_release_that_belongs_to_torch(torch_version: str, gpu_name: str, requirement: str) -> None:
    assert torch_tensorrt_requirement(torch_version, gpu_name) == requirement


@pytest.mark.parametrize("torch_version", ["2.10.0", "2.1.1", "2.15.0", "3.0.0", "nightly"])
def test_torch_without_a_release_names_those_with_one(torch_version: str) -> None:
    with pytest.raises(MissingDependency) as caught:
        torch_tensorrt_requirement(torch_version, "NVIDIA H200")
    assert torch_version in str(caught.value)
    assert all(release.torch in str(caught.value) for release in RELEASES)


def test_every_release_pins_the_minor_version_of_its_torch() -> None:
    assert all(release.torch_tensorrt.startswith(release.torch + ".") for release in RELEASES)


def test_torch_requirement_spans_the_matrix() -> None:
    assert torch_requirement() == "torch>=2.11,<2.15"


def test_installed_finds_versions_and_says_none() -> None:
    assert installed("pytest") == pytest.__version__
    assert installed("no-such-distribution") is None


def test_install_line_keeps_the_installed_torch() -> None:
    line = install_line("torch-tensorrt-rtx==2.11.0", python="/usr/bin/python3")
    assert line == f"/usr/bin/python3 -m pip install torch-tensorrt-rtx==2.11.0 torch=={installed('torch')}"


def test_install_line_can_be_pasted() -> None:
    line = install_line("torch>=2.11,<2.15", python=r"C:\My Comfy\python.exe")
    assert line == r'"C:\My Comfy\python.exe" -m pip install "torch>=2.11,<2.15"'


def test_import_needs_only_the_standard_library() -> None:
    code = "import sys; import trt_core.packages; print('torch' in sys.modules)"
    # -S leaves out site-packages: an import of anything third-party would fail.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
