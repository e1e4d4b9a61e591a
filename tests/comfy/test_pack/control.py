"""A ControlNet without a network: random residuals, given to the sampler through ComfyUI's ControlBase."""

from __future__ import annotations

from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy_api.latest import io

from .conditioning import CATEGORY, randn, seed_input


class RandomControl(ControlBase):
    """Residuals for every `stride`-th block of the chosen kind, over the image's tokens; steps are equal."""

    def __init__(self, seed: int, blocks: str, stride: int) -> None:
        super().__init__()
        self.seed, self.blocks, self.stride = seed, blocks, stride
        self._model: Any = None

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self._model = model

    def cleanup(self) -> None:
        super().cleanup()
        self._model = None

    def get_control(
        self,
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        cond: dict,
        batched_number: int,
        transformer_options: dict,
    ) -> dict | None:
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        start, end = self.timestep_range
        if t[0] > start or t[0] < end:
            return previous
        flux = self._model.diffusion_model
        control = {
            "input": self._residuals(x_noisy, len(flux.double_blocks), "double"),
            "output": self._residuals(x_noisy, len(flux.single_blocks), "single"),
        }
        return self.control_merge(control, previous, output_dtype=None)

    def _residuals(self, x_noisy: torch.Tensor, count: int, kind: str) -> list[torch.Tensor | None]:
        if self.blocks not in (kind, "both"):
            return []
        return [self._residual(x_noisy, i, kind) if i % self.stride == 0 else None for i in range(count)]

    def _residual(self, x_noisy: torch.Tensor, index: int, kind: str) -> torch.Tensor:
        batch, _, height, width = x_noisy.shape
        n_img = ((height + 1) // 2) * ((width + 1) // 2)
        seed = self.seed + index + (1000 if kind == "single" else 0)
        residual = randn(seed, 1, n_img, self._model.diffusion_model.hidden_size).repeat(batch, 1, 1)
        return residual.to(x_noisy.device, self._model.get_dtype_inference())


class Control(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Control",
            category=CATEGORY,
            inputs=[
                io.Conditioning.Input("conditioning"),
                seed_input(),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0),
                io.Combo.Input("blocks", options=["both", "double", "single"], default="both"),
                io.Int.Input("stride", default=1, min=1, max=64),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, conditioning: list, seed: int, strength: float, blocks: str, stride: int, end_percent: float
    ) -> io.NodeOutput:
        out = []
        for text, facts in conditioning:
            control = RandomControl(seed, blocks, stride)
            control.strength, control.timestep_percent_range = strength, (0.0, end_percent)
            control.set_previous_controlnet(facts.get("control"))
            out.append([text, {**facts, "control": control, "control_apply_to_uncond": False}])
        return io.NodeOutput(out)
