"""Save FP8 Model: a scaled FP8 file for ComfyUI's own loader."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .adapters.host import NodeProgress, named
from .adapters.quantize_file import Saved, save_fp8

NODE = "Save FP8 Model"


class SaveFp8Model(io.ComfyNode):
    """Writes the model that comes from FP8 Quantize to models/diffusion_models, LoRAs merged in. Load Diffusion Model
    opens the file as a scaled FP8 model, in half the size, and gives the picture that FP8 Quantize gives alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TRT_SaveFp8Model",
            display_name=NODE,
            category="TensorRT",
            description=" ".join((cls.__doc__ or "").split()),
            search_aliases=["fp8", "save model", "scaled fp8", "checkpoint", "export", "tensorrt"],
            inputs=[
                io.Model.Input("model", tooltip="A model that comes from FP8 Quantize. LoRAs on it are merged in."),
                io.String.Input(
                    "filename", default="flux1-fp8",
                    tooltip="Below models/diffusion_models, without .safetensors; folders are made.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a file of that name. Off stops with an error instead.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, filename: str, overwrite: bool) -> io.NodeOutput:
        with named(NODE):
            saved = save_fp8(model, filename, overwrite, NodeProgress(cls.hidden.unique_id))
        return io.NodeOutput(ui=ui.PreviewText(_text(saved)))


def _text(saved: Saved) -> str:
    size = f"{saved.size_bytes / 1e9:.2f} GB" if saved.size_bytes >= 10**8 else f"{saved.size_bytes / 1e6:.2f} MB"
    lines = [str(saved.path), f"{size}, {saved.layers} layers in FP8"]
    if saved.patched:
        lines.append(f"LoRAs merged into {saved.patched} weights")
    return "\n".join(lines)
