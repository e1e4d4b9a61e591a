"""A recorder: which callbacks ComfyUI makes, what it hands to FLUX, and which blocks it runs itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import io

from .conditioning import CATEGORY

KEY = "test_spy"


class Recorder:
    """Appends one JSON line per event to `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, event: str, **facts: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")

    def callback(self, event: str) -> Callable[..., None]:
        def record(patcher: Any, *args: Any) -> None:
            facts = {
                "patcher": f"{id(patcher):x}",
                "class": type(patcher).__name__,
                "keys": len(patcher.patches),
            }
            self.write(event, **facts, patches_uuid=str(patcher.patches_uuid), args=[describe(arg) for arg in args])

        return record

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs what comes next and counts the calls of each block's own forward meanwhile."""
        flux, calls = executor.class_obj, Counter()
        blocks = {f"double {i}": block for i, block in enumerate(flux.double_blocks)}
        blocks |= {f"single {i}": block for i, block in enumerate(flux.single_blocks)}
        hooks = [
            block.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
            for name, block in blocks.items()
        ]
        try:
            return executor(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            described = {name: describe(value) for name, value in kwargs.items()}
            self.write("diffusion_model", args=[describe(arg) for arg in args], kwargs=described, blocks=calls)


def describe(value: Any) -> Any:
    """A value as JSON: tensors as dtype and shape, containers by their parts, others as their type's name."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


class Spy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Spy",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), io.String.Input("path")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, path: str) -> io.NodeOutput:
        spied, recorder = model.clone(), Recorder(path)
        events = {value for name, value in vars(CallbacksMP).items() if name.startswith("ON_")}
        for event in sorted(events):
            spied.add_callback_with_key(event, KEY, recorder.callback(event))
        spied.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, recorder.diffusion_model)
        return io.NodeOutput(spied)
