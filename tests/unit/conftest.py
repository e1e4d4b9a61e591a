"""Unit tests run on the CPU, offline, with one thread, so that results do not depend on the machine."""

from __future__ import annotations

import os

import pytest
import torch

# Before any test imports a Hugging Face package, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
