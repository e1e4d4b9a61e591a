"""What our pack tells ComfyUI about memory, and another pack's block in the place of one of the model's."""

from __future__ import annotations

import copy
import json
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from .conditioning import CATEGORY


class FreeBound(io.ComfyNode):
    """Asks for `free_bytes` of the bound weights' memory as ComfyUI does when another model needs them, or the next run
    of the same one (`at_load`); 0: asks not.

    Says what they took as ComfyUI sees it, what they take now, and whether they are still loaded.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_FreeBound",
            category=CATEGORY,
            inputs=[
                io.Latent.Input("samples"),
                io.Int.Input("free_bytes", default=0, min=0, max=2**40),
                io.Boolean.Input("at_load", default=False),
            ],
            outputs=[io.Latent.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict, free_bytes: int, at_load: bool) -> io.NodeOutput:
        models = comfy.model_management.current_loaded_models
        bound = next(loaded for loaded in models if type(loaded.model.model).__name__ == "TRTWeights")
        said = {"size": bound.model_memory(), "loaded": bound.model_loaded_memory(), "kept": True}
        if at_load:
            bound.model_use_more_vram(-free_bytes)
        elif free_bytes and bound.model_unload(free_bytes):
            models.remove(bound)
            said["kept"] = False
        said["after"] = bound.model_loaded_memory()
        return io.NodeOutput(samples, ui=ui.PreviewText(json.dumps(said)))


class OtherWeights(io.ComfyNode):
    """An object patch: a single block with weights of its own, all of them doubled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_OtherWeights",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), io.Int.Input("index", default=0, min=0, max=100)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, index: int) -> io.NodeOutput:
        patched, name = model.clone(), f"diffusion_model.single_blocks.{index}"
        with torch.inference_mode(False), torch.no_grad():
            block = copy.deepcopy(patched.get_model_object(name))
            for parameter in block.parameters():
                parameter.mul_(2)
        patched.add_object_patch(name, block)
        return io.NodeOutput(patched)
