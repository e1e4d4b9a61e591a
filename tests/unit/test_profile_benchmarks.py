"""What a profile and a memory peak are put down to: whose copies they are, whose memory it was."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.memory import shares_of
from benchmarks.profile import Kernel, copies_before, summary

_MEGABYTES = 200
_HOLDS = f"x = b'1' * ({_MEGABYTES} * 2**20); print(flush=True); input(); # tensorrt_worker"


def kernels(*names: str) -> list[Kernel]:
    return [Kernel(name, 2.0 * i, 2.0 * i + 1, 1.0) for i, name in enumerate(names)]


def test_a_memset_belongs_to_the_kernel_after_it() -> None:
    seen = kernels(
        "Memset (Device)", "nvjet_a", "Memset (Device)", "Memcpy DtoD", "sdpa_b", "nvjet_a", "Memset (Device)"
    )
    assert copies_before(seen * 2, steps=2) == {
        "Memset (Device) -> nvjet_a": 1.5, "Memset (Device) -> sdpa_b": 1.0, "Memcpy DtoD -> sdpa_b": 1.0,
    }  # fmt: skip


def test_a_profile_says_whose_copies_there_are() -> None:
    line = summary(kernels("Memset (Device)", "nvjet_a"), 1, 1.0, {})
    assert line["copies_before"] == {"Memset (Device) -> nvjet_a": 1.0}
    assert line["classes"]["copies, memsets"]["launches"] == 1


def test_memory_is_told_by_process() -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = shares_of(os.getpid())
        child.communicate(b"\n")
    share = next(share for share in found if share.process == "tensorrt_worker")
    assert _MEGABYTES * 2**20 <= share.anonymous_bytes <= share.bytes < (_MEGABYTES + 50) * 2**20
    assert found == sorted(found, key=lambda share: -share.bytes)
    assert len(found) >= 2


def test_a_process_that_has_ended_has_no_share() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert shares_of(child.pid) == []
