"""FP8 Quantize: MODEL in, MODEL out, in half the memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trt_core.fp8_recipe import MAX_HEADROOM, Activations, Fp8Config, Granularity
from .adapters.host import named, show
from .adapters.quantize import quantized
from .adapters.quantize_calibration import Calibration

NODE = "FP8 Quantize"
_GRANULARITY = {"per row": Granularity.ROW, "per tensor": Granularity.TENSOR}


class Fp8Quantize(io.ComfyNode):
    """Runs the layers of FLUX.1's blocks in FP8: half the memory, and faster on GPUs from RTX 40 on. Before TRT Compile
    Transformer, LoRAs are merged into the full weights and stay exact; without it, ComfyUI's own FP8 runs the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TRT_Fp8Quantize",
            display_name=NODE,
            category="TensorRT",
            description=" ".join((cls.__doc__ or "").split()),
            search_aliases=["fp8", "quantize", "float8", "scaled fp8", "memory", "vram", "tensorrt"],
            inputs=_inputs(),
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, to be run in FP8.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # puts the node's id into the cache key: text and progress belong to one node
        )

    @classmethod
    def execute(
        cls, model: Any, granularity: str, activations: str, exclude: str = "", calibration_steps: int = 8,
        headroom: float = 2.0, conditioning: Any = None, latent: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        with named(NODE):
            config = Fp8Config(_GRANULARITY[granularity], Activations(activations), patterns(exclude), headroom)
            calibration = None if conditioning is None else Calibration(conditioning, latent, calibration_steps)
            clone, found = quantized(model, config, calibration, NODE, cls.hidden.unique_id)
        show(cls.hidden.unique_id, "\n".join(found.lines()))
        return io.NodeOutput(clone)


def patterns(text: str) -> tuple[str, ...]:
    """One pattern per line; empty lines and a weight's ".weight" do not matter."""
    lines = (line.strip().removesuffix(".weight") for line in text.splitlines())
    return tuple(dict.fromkeys(line for line in lines if line))


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="A FLUX.1 model in bf16, fp16 or fp32. LoRAs may come before or after."),
        io.Combo.Input(
            "granularity", options=list(_GRANULARITY), default="per row",
            tooltip="How many scales a weight has. per row is more precise, and runs with TRT Compile Transformer; "
            "ComfyUI's own FP8 always has one scale per tensor.",
        ),
        io.Combo.Input(
            "activations", options=[each.value for each in Activations], default=Activations.DYNAMIC.value,
            tooltip="Where the scale of a layer's input comes from. dynamic measures it at each call; static measures "
            "it once, now, with the conditioning connected below.",
        ),
        io.String.Input(
            "exclude", multiline=True, default="",
            tooltip="Layers that stay in full precision, one pattern per line, such as single_blocks.*.linear2 or "
            "double_blocks.0.*",
        ),
        io.Int.Input(
            "calibration_steps", default=8, min=2, max=100, advanced=True,
            tooltip="With conditioning: how many steps of one picture are watched.",
        ),
        io.Float.Input(
            "headroom", default=2.0, min=1.0, max=MAX_HEADROOM, step=0.1, advanced=True,
            tooltip="For static activations: room above the largest input that was seen, for other prompts and LoRAs.",
        ),
        io.Conditioning.Input(
            "conditioning", optional=True,
            tooltip="The prompt that is sampled, now, to see what goes into layers. The mean error that rounding the "
            "weights makes is then taken out of the layer's bias under TRT Compile Transformer, which costs nothing "
            "per step. Static activations need it.",
        ),
        io.Latent.Input(
            "latent", optional=True,
            tooltip="The size of the picture that is sampled with the conditioning. Without it, 1024 x 1024 px.",
        ),
    ]  # fmt: skip
