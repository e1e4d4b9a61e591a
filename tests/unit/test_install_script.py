"""install.py: what it decides on each machine, and that pip can never replace torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import install
from trt_core import packages

NEWEST = packages.RELEASES[-1]
TORCH = f"{NEWEST.torch}.0+cu130"
RTX, DATA_CENTRE = "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"


def having(**versions: str) -> Callable[[str], str | None]:
    return {name.replace("_", "-"): version for name, version in versions.items()}.get


@pytest.mark.parametrize(("gpu", "name"), [(RTX, packages.RTX), (DATA_CENTRE, packages.STANDARD)])
def test_the_one_that_fits_torch_and_gpu(gpu: str, name: str) -> None:
    decision = install.decide(TORCH, gpu, having())
    assert decision.requirement == f"{name}=={NEWEST.torch_tensorrt}"
    assert gpu in decision.text


@pytest.mark.parametrize(
    ("torch_version", "gpu", "words"),
    [
        (None, RTX, "torch is not installed"),
        (TORCH, None, "no NVIDIA GPU"),
        ("2.4.0", RTX, "no Torch-TensorRT for torch 2.4.0"),
    ],
)
def test_nothing_is_installed_where_nothing_fits(torch_version: str | None, gpu: str | None, words: str) -> None:
    decision = install.decide(torch_version, gpu, having())
    assert decision.requirement == ""
    assert words in decision.text
    assert install.WITHOUT in decision.text


def test_what_is_there_already_stays() -> None:
    decision = install.decide(TORCH, DATA_CENTRE, having(torch_tensorrt=NEWEST.torch_tensorrt))
    assert decision.requirement == ""
    assert "installed already" in decision.text


@pytest.mark.parametrize("present", [{"torch_tensorrt": "2.5.0"}, {"torch_tensorrt_rtx": NEWEST.torch_tensorrt}])
def test_another_one_is_left_alone_and_said(present: dict[str, str]) -> None:
    decision = install.decide(TORCH, DATA_CENTRE, having(**present))
    assert decision.requirement == ""
    assert "was left alone" in decision.text
    assert f"torch-tensorrt=={NEWEST.torch_tensorrt}" in decision.text


def test_pip_is_held_to_the_installed_torch(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in pip's place writes down what it was asked for and fails."""
    asked = tmp_path / "asked.txt"
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" > "{asked}"\nexit 1\n')
    program.chmod(0o755)
    if sys.platform == "win32":
        pytest.skip("a shell script stands in for pip")
    monkeypatch.setattr(sys, "executable", str(program))
    said = install.install("torch-tensorrt==2.13.0", "2.13.0+cu130")
    assert asked.read_text().split() == ["-m", "pip", "install", "torch-tensorrt==2.13.0", "torch==2.13.0+cu130"]
    assert "could not install" in said
    assert "was not touched" in said


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((9, 0), [packages.CUDNN_FRONTEND_REQUIREMENT, packages.FLASH3_REQUIREMENT]),
        ((12, 0), [packages.CUDNN_FRONTEND_REQUIREMENT]),
        ((8, 9), []),
        (None, []),
    ],
)
def test_attention_kernels_where_they_run(
    capability: tuple[int, int] | None, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packages.installed(packages.CUDNN_FRONTEND) is None
    assert packages.installed(packages.FLASH3) is None
    monkeypatch.setattr(packages, "has_flash3_wheel", lambda: True)
    assert [decision.requirement for decision in install.decide_attention(capability)] == wanted


def test_no_flash_attention_3_where_there_is_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.sys, "platform", "win32")
    assert packages.attention_requirements((9, 0)) == [packages.CUDNN_FRONTEND_REQUIREMENT]
