"""LoRA files and the mathematics of their changes, on any device and independent of engines."""

from __future__ import annotations

from .changes import (
    Additive,
    Change,
    Difference,
    Dora,
    DoraRule,
    Hadamard,
    Kronecker,
    LowRank,
    Patch,
    Replacement,
    SwappedHalves,
    merged,
)
from .files import Lora, fingerprint, load_lora
from .keys import ReadKeys, read_keys
from .targets import LoraFormat, Shapes

__all__ = [
    "Additive",
    "Change",
    "Difference",
    "Dora",
    "DoraRule",
    "Hadamard",
    "Kronecker",
    "Lora",
    "LoraFormat",
    "LowRank",
    "Patch",
    "ReadKeys",
    "Replacement",
    "Shapes",
    "SwappedHalves",
    "fingerprint",
    "load_lora",
    "merged",
    "read_keys",
]
