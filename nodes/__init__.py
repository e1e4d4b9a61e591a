"""The pack's nodes for ComfyUI. They register without TensorRT, ModelOpt or a GPU."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .adapters.host import register_engine_folder
from .compile_transformer import CompileTransformer
from .engine_cache import EngineCacheNode
from .fp8_quantize import Fp8Quantize
from .lora_refit import LoraRefit
from .save_fp8_model import SaveFp8Model


class TRTExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        register_engine_folder()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [CompileTransformer, LoraRefit, EngineCacheNode, Fp8Quantize, SaveFp8Model]
