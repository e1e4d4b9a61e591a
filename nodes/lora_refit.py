"""TRT LoRA Refit: several LoRAs in one node, ready for the next switch."""

from __future__ import annotations

import os
import time
from typing import Any

import folder_paths
from comfy_api.latest import io

from .adapters.host import named, show
from .adapters.lora_files import NONE, Slot, with_loras
from .adapters.text import REFIT_NODES

NODE = "TRT LoRA Refit"
SLOTS = 4
_MB = 10**6


class LoraRefit(io.ComfyNode):
    """Applies up to four LoRAs, with the same result as ComfyUI's LoRA loaders. Files stay parsed in memory, so
    changing one, its strength or its switch costs only the merge, and the node says what that took. Chain several for
    more. Works before or after TRT Compile Transformer, and without it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TRT_LoraRefit",
            display_name=NODE,
            category="TensorRT",
            description=" ".join((cls.__doc__ or "").split()),
            search_aliases=["lora", "load lora", "lora stack", "lora switch", "tensorrt", "refit"],
            inputs=[io.Model.Input("model", tooltip="The model that the LoRAs are applied to."), *_inputs()],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the LoRAs applied.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # puts the node's id into the cache key: text belongs to one node
        )

    @classmethod
    def fingerprint_inputs(cls, **widgets: Any) -> str:
        """A file that was saved again counts as a change."""
        paths = [folder_paths.get_full_path("loras", slot.file) for slot in _slots(widgets)]
        return repr([(path, path and os.stat(path).st_mtime) for path in paths])

    @classmethod
    def execute(cls, model: Any, keep_mb: int = 2048, **widgets: Any) -> io.NodeOutput:
        started, slots, node_id = time.perf_counter(), _slots(widgets), cls.hidden.unique_id
        with named(NODE):
            patched, counts = with_loras(model, slots, keep_mb * _MB)
        patched.set_attachments(REFIT_NODES, (*patched.attachments.get(REFIT_NODES, ()), node_id))
        show(node_id, _text(slots, counts, (time.perf_counter() - started) * 1000))
        return io.NodeOutput(patched)


def _inputs() -> list[io.Input]:
    files = [NONE, *folder_paths.get_filename_list("loras")]
    inputs: list[io.Input] = []
    for slot in range(1, SLOTS + 1):
        later = slot > 1
        inputs += [
            io.Combo.Input(
                f"lora_{slot}", options=files, default=NONE, optional=later,
                tooltip="A .safetensors file below models/loras.",
            ),
            io.Float.Input(
                f"strength_{slot}", default=1.0, min=-100.0, max=100.0, step=0.01, optional=later,
                tooltip="How strongly it changes the model; negative turns it around.",
            ),
            io.Boolean.Input(
                f"on_{slot}", default=True, optional=later, tooltip="Off is the same as no file here.",
            ),
        ]  # fmt: skip
    keep = io.Int.Input(
        "keep_mb", default=2048, min=0, max=65536, step=256, optional=True, advanced=True,
        tooltip="LoRA files kept parsed in memory, in MB; those unused for longest go first.",
    )  # fmt: skip
    return [*inputs, keep]


def _slots(widgets: dict[str, Any]) -> list[Slot]:
    """The slots that change something, in order. A slot that a workflow leaves out is off."""
    slots = []
    for number in range(1, SLOTS + 1):
        file, strength = widgets.get(f"lora_{number}") or NONE, widgets.get(f"strength_{number}", 1.0)
        if file != NONE and strength and widgets.get(f"on_{number}", True):
            slots.append(Slot(file, strength, f"lora_{number}"))
    return slots


def _text(slots: list[Slot], counts: list[int], milliseconds: float) -> str:
    if not slots:
        return "No LoRA"
    lines = [f"{s.file} {s.strength:g}: {count} layers" for s, count in zip(slots, counts, strict=True)]
    return "\n".join([*lines, f"ready in {milliseconds:.0f} ms"])
