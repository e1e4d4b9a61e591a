"""Models that cannot be compiled, and a look at what the server holds."""

from __future__ import annotations

import gc
import json
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch._subclasses import FakeTensor

from .conditioning import CATEGORY, seed_input


class SomeTransformer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)


class SomeModel(torch.nn.Module):
    """Like a BaseModel of an architecture that nobody here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = SomeTransformer()


class OtherModel(io.ComfyNode):
    """A MODEL that is not FLUX."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Test_OtherModel", category=CATEGORY, inputs=[], outputs=[io.Model.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        device = comfy.model_management.get_torch_device()
        return io.NodeOutput(ModelPatcher(SomeModel(), device, device))


class Gguf(io.ComfyNode):
    """Gives the model's weights the two attributes that ComfyUI-GGUF's tensors have. The model is spoilt by it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Gguf", category=CATEGORY, inputs=[io.Model.Input("model")], outputs=[io.Model.Output()]
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        for weight in model.model.diffusion_model.parameters():
            weight.tensor_type, weight.tensor_shape = 8, weight.shape
        return io.NodeOutput(model)


class Memory(io.ComfyNode):
    """Which models ComfyUI holds as loaded, and how many bytes of tensors are alive in the server."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Memory", category=CATEGORY, inputs=[seed_input("nonce")], outputs=[], is_output_node=True
        )

    @classmethod
    def execute(cls, nonce: int) -> io.NodeOutput:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            # A compilation that was cancelled may still trace, with tensors that have no memory.
            traced = isinstance(thing, FakeTensor)
            if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and not thing.is_meta and not traced:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        loaded = [patcher.model.__class__.__name__ for patcher in comfy.model_management.loaded_models()]
        return io.NodeOutput(ui=ui.PreviewText(json.dumps({"loaded": loaded, "bytes": sum(storages.values())})))
