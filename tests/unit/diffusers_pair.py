"""A compiled transformer beside an eager one of the same weights: whatever is done to both, they must agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, PeftConfig
from torch import Tensor

from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core import compile_transformer
from trt_core.backends.check import relative_l2
from trt_core.host import Silent

LORA_BOUND = 5e-6
"""Largest relative error in fp32 under a LoRA: diffusers adds x A B to x W, we multiply x by W + A B."""
EVERY_LINEAR = [
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out", "ff.net.0.proj",
    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear", "norm.linear",
    "proj_mlp", "proj_out", "x_embedder", "context_embedder", "norm_out.linear", "linear_1", "linear_2",
]  # fmt: skip
ATTENTION = ["to_q", "to_k", "to_v"]


class Pair:
    """`ours` is compiled, `theirs` is what diffusers does."""

    def __init__(self, cache: Path, model: FluxTransformer2DModel | None = None, **options: Any) -> None:
        self.ours = model or tiny_transformer(adversarial=True)
        self.theirs = copy.deepcopy(self.ours)
        self.options = {"backend": "eager", "cache_folder": str(cache), "progress": Silent(), **options}
        compile_transformer(self.ours, **self.options)

    def both(self, change: Callable[[FluxTransformer2DModel], object]) -> None:
        """Does the same to both, with the same random numbers."""
        for model in (self.ours, self.theirs):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(11)
                change(model)

    def add(self, name: str, config: PeftConfig) -> None:
        self.both(lambda model: model.add_adapter(copy.deepcopy(config), adapter_name=name))

    def outputs(self, sizes: dict[str, int] | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Both models' outputs; `sizes` are those of `call_inputs`, `arguments` go to the forward."""
        inputs = call_inputs(self.theirs, **(sizes or {}))
        return run_diffusers(self.ours, inputs, **arguments), run_diffusers(self.theirs, inputs, **arguments)

    def error(self, sizes: dict[str, int] | None = None, **arguments: Any) -> float:
        return relative_l2(*self.outputs(sizes, **arguments))

    @property
    def report(self) -> Any:
        return self.ours.trt_report()

    @property
    def layers(self) -> int:
        """How many layers the last refit wrote."""
        return self.report.last_refit.layers


def lora(*targets: str, rank: int = 4, **options: Any) -> LoraConfig:
    """A random LoRA, not one that starts at zero."""
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets or ATTENTION), init_lora_weights=False, **options
    )
