"""Graphs with our FP8 nodes, and how large FP8's error is."""

from __future__ import annotations

from tests.comfy.graph import FluxGraph, Link

FP8_OPTIONS = {
    "granularity": "per row", "activations": "dynamic", "exclude": "", "calibration_steps": 2, "headroom": 2.0,
}  # fmt: skip
LEAST, MOST = 0.003, 0.08
"""Relative error of a latent after a run in FP8: E4M3's step is 6 %, bf16's or none would be far below, and the LoRA
a.safetensors changes a latent by 0.14."""


def fp8(graph: FluxGraph, model: Link, **options: object) -> Link:
    """FP8 Quantize; `options` as on the node."""
    return graph.add("TRT_Fp8Quantize", model=model, **{**FP8_OPTIONS, **options})
