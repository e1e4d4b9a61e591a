"""Triton kernels on a machine without a GPU: all compile, for every generation, and some run in the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""What a block may have of shared memory (CUDA C++ programming guide, compute capabilities)."""
FP8_KERNELS = {
    "_quantize_kernel",
    "_merge_kernel",
    "_merge_low_rank_fp8_kernel",
    "_bound_kernel",
    "_queries_keys_values_kernel",
}


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.triton_without_gpu", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def kernels() -> set[str]:
    """Names of all functions that are launched, as the sources define them."""
    sources = (*(ROOT / "trt_core" / "flux").glob("triton_*.py"), ROOT / "trt_core" / "triton_merge.py")
    text = "\n".join(path.read_text() for path in sources)
    return set(re.findall(r"^@triton\.jit\ndef (_\w+_kernel)\(", text, re.MULTILINE))


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    seen = json.loads(run("compile", str(capability), TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1])
    assert set(seen) == (kernels() if capability >= 89 else kernels() - FP8_KERNELS)
    assert max(seen.values()) <= SHARED_BYTES[capability]


def test_interpreted_kernels_compute_what_plain_pytorch_does() -> None:
    run("interpret", TRITON_INTERPRET="1")
