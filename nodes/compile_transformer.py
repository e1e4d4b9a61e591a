"""TRT Compile Transformer: MODEL in, MODEL out, compiled at its first run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trt_core.config import Attention, Backend, BaseWeights, CompileConfig, Profile, ShapeRange
from .adapters.host import engine_folder, named
from .adapters.model_patcher import compiled

NODE = "TRT Compile Transformer"
AUTOMATIC, UP_TO = "automatic", "up to max_side"
REBUILD, STOP = "build again", "stop with an error"
_TUNED_TOKENS = 4096
"""What a profile of its own is tuned for: 1024 x 1024 px."""


class CompileTransformer(io.ComfyNode):
    """Runs the transformer of a FLUX.1 model through compiled blocks. LoRA nodes work before and after it, and
    switching LoRAs never compiles again. Put it between the loader and the sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TRT_CompileTransformer",
            display_name=NODE,
            category="TensorRT",
            description=" ".join((cls.__doc__ or "").split()),
            search_aliases=["tensorrt", "torch-tensorrt", "compile", "speed", "inductor", "flux"],
            inputs=_inputs(),
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, compiled at its first run.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # puts the node's id into the cache key: text and progress belong to one node
        )

    @classmethod
    def execute(
        cls, model: Any, backend: str, attention: str = "auto", base_weights: str = "auto", profile: str = AUTOMATIC,
        max_side: int = 2048, max_batch: int = 4, outside_profile: str = REBUILD,
    ) -> io.NodeOutput:  # fmt: skip
        config = CompileConfig(
            Backend(backend), Attention(attention), BaseWeights(base_weights),
            None if profile == AUTOMATIC else _profile(max_side, max_batch), outside_profile == REBUILD,
            engine_folder(),
        )  # fmt: skip
        with named(NODE):
            return io.NodeOutput(compiled(model, config, NODE, cls.hidden.unique_id))


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="A FLUX.1 model. LoRAs may be applied before this node or after it."),
        io.Combo.Input(
            "backend", options=["auto", "tensorrt", "inductor", "eager"], default="auto",
            tooltip="auto measures what this machine has and keeps the fastest. tensorrt and inductor force one; "
            "eager compiles nothing. Without a GPU, auto is eager.",
        ),
        io.Combo.Input(
            "attention", options=["auto", "cudnn", "flash", "flash3", "efficient", "math"], default="auto",
            advanced=True,
            tooltip="The attention kernel of compiled blocks. flash3 needs fa3-fwd and an H100 or H200. auto measures "
            "those that this GPU runs, and for FP8 "
            "models on an H100 or newer one in FP8.",
        ),
        io.Combo.Input(
            "base_weights", options=["auto", "gpu", "host"], default="auto", advanced=True,
            tooltip="Where unchanged weights of layers under a LoRA are kept. gpu switches fastest, host saves GPU "
            "memory; auto looks at what is free.",
        ),
        io.Combo.Input(
            "profile", options=[AUTOMATIC, UP_TO], default=AUTOMATIC, advanced=True,
            tooltip="Which sizes TensorRT's engines take. automatic: 256 to 2048 px, batch 1 to 4, tuned for the first "
            "picture. Or up to max_side and max_batch below.",
        ),
        io.Int.Input(
            "max_side", default=2048, min=256, max=8192, step=16, advanced=True,
            tooltip="For a profile of your own: the largest square picture in px, reference pictures included.",
        ),
        io.Int.Input(
            "max_batch", default=4, min=1, max=64, advanced=True,
            tooltip="For a profile of your own: the largest batch; CFG above 1 counts twice.",
        ),
        io.Combo.Input(
            "outside_profile", options=[REBUILD, STOP], default=REBUILD, advanced=True,
            tooltip="What to do with a size outside the profile. Building again takes seconds.",
        ),
    ]  # fmt: skip


def _profile(max_side_px: int, max_batch: int) -> Profile:
    largest = (max_side_px // 16) ** 2
    return Profile(
        ShapeRange(1, min(_TUNED_TOKENS, largest), largest), ShapeRange(1, 512, 1024), ShapeRange(1, 1, max_batch)
    )
