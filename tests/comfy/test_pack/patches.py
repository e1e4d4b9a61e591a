"""What other packs do to FLUX: replace a block, or patch attention, inputs and calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io

from .conditioning import CATEGORY


def _original(args: dict, extra: dict) -> dict:
    return extra["original_block"](args)


def _skip(args: dict, extra: dict) -> dict:
    return {name: args[name] for name in ("img", "txt") if name in args}


def _half(args: dict, extra: dict) -> dict:
    """Halfway between a block's input and output. ComfyUI's blocks write into their input: keep copies."""
    before = {name: tensor.clone() for name, tensor in _skip(args, extra).items()}
    return {name: (tensor + before[name]) / 2 for name, tensor in _original(args, extra).items()}


REPLACEMENTS: dict[str, Callable[[dict, dict], dict]] = {"original": _original, "half": _half, "skip": _skip}


class ReplaceBlock(io.ComfyNode):
    """`patches_replace["dit"][(kind, index)]`, as layer skipping, PuLID and IP-Adapters use it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_ReplaceBlock",
            category=CATEGORY,
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("kind", options=["double_block", "single_block"]),
                io.Int.Input("index", default=0, min=0, max=100),
                io.Combo.Input("replacement", options=list(REPLACEMENTS)),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, index: int, replacement: str) -> io.NodeOutput:
        patched = model.clone()
        patched.set_model_patch_replace(REPLACEMENTS[replacement], "dit", kind, index)
        return io.NodeOutput(patched)


class Scale:
    """Every patch scales one tensor by `factor`, so that 1 must change nothing."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def post_input(self, args: dict) -> dict:
        return {**args, "img": args["img"] * self.factor}

    def attn1_patch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pe: Any, attn_mask: Any, extra_options: dict
    ) -> dict:
        return {"q": q, "k": k, "v": v * self.factor}

    def attn1_output_patch(self, attn: torch.Tensor, extra_options: dict) -> torch.Tensor:
        return attn * self.factor

    def attention_override(self, attention: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs) * self.factor

    def model_function_wrapper(self, apply_model: Callable[..., torch.Tensor], args: dict) -> torch.Tensor:
        return apply_model(args["input"], args["timestep"], **args["c"]) * self.factor

    def diffusion_model_wrapper(self, executor: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return executor(*args, **kwargs) * self.factor


class Patch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Patch",
            category=CATEGORY,
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("kind", options=[name for name in vars(Scale) if not name.startswith("_")]),
                io.Float.Input("factor", default=1.0, min=-10.0, max=10.0),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, factor: float) -> io.NodeOutput:
        patched = model.clone()
        patch = getattr(Scale(factor), kind)
        if kind == "attention_override":
            patched.model_options["transformer_options"]["optimized_attention_override"] = patch
        elif kind == "model_function_wrapper":
            patched.set_model_unet_function_wrapper(patch)
        elif kind == "diffusion_model_wrapper":
            patched.add_wrapper_with_key("diffusion_model", "test_patch", patch)
        else:
            patched.set_model_patch(patch, kind)
        return io.NodeOutput(patched)


class ReplaceModule(io.ComfyNode):
    """An object patch: another block of the same weights in the place of one, which gives half of what it does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_ReplaceModule",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), io.Int.Input("index", default=0, min=0, max=100)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, index: int) -> io.NodeOutput:
        patched = model.clone()
        name = f"diffusion_model.single_blocks.{index}"
        block = copy.copy(patched.get_model_object(name))
        block.__class__ = type("HalfBlock", (type(block),), {"forward": _half_forward})
        patched.add_object_patch(name, block)
        return io.NodeOutput(patched)


def _half_forward(self: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    before = x.clone()
    return (super(type(self), self).forward(x, **kwargs) + before) / 2
