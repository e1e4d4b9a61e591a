"""The files that the server's models folder starts with."""

from __future__ import annotations

from pathlib import Path

from tests.comfy.checkpoint import (
    FluxShape,
    write_flux,
    write_flux_fp8_scaled,
    write_lora_control,
    write_lora_diffusers,
    write_lora_kohya,
)

DEV, SCHNELL, FILL = FluxShape(), FluxShape(guidance=False), FluxShape(in_channels=384)
UNKNOWN = "unknown.safetensors"
"""In the models folder, but holds no model that ComfyUI knows."""


def write_models(models: Path) -> None:
    """FLUX dev, schnell and Fill of depth 2 + 2, dev also with scaled float8, and LoRA files that fit."""
    unets, loras = models / "diffusion_models", models / "loras"
    write_flux(unets / "flux_dev.safetensors", DEV)
    write_flux(unets / "flux_dev_2.safetensors", DEV, seed=1)
    write_flux(unets / "flux_prefixed.safetensors", DEV, prefix="model.diffusion_model.")
    write_flux(unets / "flux_schnell.safetensors", SCHNELL)
    write_flux(unets / "flux_fill.safetensors", FILL)
    write_flux_fp8_scaled(unets / "flux_fp8.safetensors", DEV)
    write_lora_diffusers(unets / UNKNOWN, DEV, seed=1)
    write_lora_kohya(loras / "a.safetensors", DEV, seed=1)
    write_lora_diffusers(loras / "b.safetensors", DEV, seed=2, only="attn")
    write_lora_control(loras / "control.safetensors", DEV, seed=3)
