"""FLUX compiled in block segments with bound weights. Names load on first use, so importing costs nothing."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "TRTError": "errors",
    "CompileConfig": "config",
    "Profile": "config",
    "ShapeRange": "config",
    "compile_transformer": "diffusers_adapter",
    "restore_transformer": "diffusers_adapter",
    "MutableTRTModule": "mutable_module",
    "load_lora": "lora",
    "file_patches": "weights",
    "EngineCache": "engine_cache",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trt_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
