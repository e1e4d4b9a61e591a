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
    "quantize_fp8_": "quantize",
    "dequantize_": "quantize",
    "calibrate_with_modelopt": "quantize",
    "flux_architecture": "quantize",
    "Fp8Config": "fp8_recipe",
    "Granularity": "fp8_recipe",
    "Activations": "fp8_recipe",
    "PromptCalibration": "calibration",
    "record_calls": "calibration",
    "modelopt_config": "modelopt_input",
    "save_recipe": "recipe_file",
    "load_recipe": "recipe_file",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trt_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
