"""A FluxPipeline from files on the GPU: pictures, LoRA files, and diffusers' own model offload."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import trt_core
from demo.checkpoint import write_tiny_loras, write_tiny_pipeline
from trt_core.backends.check import relative_l2
from trt_core.host import Silent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DEVICE = "cuda"
BOUND = 1e-4
"""fp32 on the GPU; TF32 is off for matrix products unless a program turns it on."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write_tiny_pipeline(folder / "pipeline")
    write_tiny_loras(folder / "loras")
    return folder


class Pipelines:
    """Ours compiled (or about to be), theirs eager; both from the same files in fp32."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files = files
        self.ours, self.theirs = (
            FluxPipeline.from_pretrained(files / "pipeline", torch_dtype=torch.float32) for _ in range(2)
        )
        for pipe in (self.ours, self.theirs):
            pipe.set_progress_bar_config(disable=True)
        self._options: dict[str, Any] = {"backend": "eager", "cache_folder": str(cache), "progress": Silent()}

    def compile(self, **options: Any) -> None:
        trt_core.compile_transformer(self.ours, **{**self._options, **options})

    def both(self, call: Callable[[FluxPipeline], object]) -> None:
        call(self.ours)
        call(self.theirs)

    def load(self, name: str) -> None:
        file = str(self.files / "loras" / f"{name}.safetensors")
        self.both(lambda pipe: pipe.load_lora_weights(file, adapter_name=name))

    def agree(self) -> torch.Tensor:
        seen, expected = (
            pipe(
                "a cat", height=64, width=96, num_inference_steps=2, max_sequence_length=16, output_type="latent",
                generator=torch.Generator().manual_seed(3),
            ).images
            for pipe in (self.ours, self.theirs)
        )  # fmt: skip
        assert relative_l2(seen, expected.to(seen.device)) < BOUND
        return seen


@pytest.mark.parametrize("base_weights", ["gpu", "host"])
def test_lora_files_on_the_gpu(base_weights: str, files: Path, tmp_path: Path) -> None:
    pipes = Pipelines(files, tmp_path)
    pipes.both(lambda pipe: pipe.to(DEVICE))
    pipes.compile(base_weights=base_weights)
    base = pipes.agree()
    pipes.load("a")
    only_a = pipes.agree()
    pipes.load("b")
    pipes.both(lambda pipe: pipe.set_adapters(["a", "b"], [0.5, -1.0]))
    pipes.agree()
    pipes.both(lambda pipe: pipe.fuse_lora())
    pipes.agree()
    pipes.both(lambda pipe: pipe.unfuse_lora())
    pipes.both(lambda pipe: pipe.set_adapters("a"))
    assert relative_l2(pipes.agree(), only_a) < BOUND, "fused and unfused, as diffusers rounds it"
    pipes.both(lambda pipe: pipe.unload_lora_weights())
    assert relative_l2(pipes.agree(), base) < BOUND
    assert pipes.ours.transformer.device.type == DEVICE
    assert pipes.ours.transformer.trt_report().builds == 1


@pytest.mark.parametrize("first", ["offload", "compile"])
def test_model_offload_keeps_the_transformer_compiled(first: str, files: Path, tmp_path: Path) -> None:
    pipes = Pipelines(files, tmp_path)
    if first == "compile":
        pipes.compile()
    pipes.both(lambda pipe: pipe.enable_model_cpu_offload())
    if first == "offload":
        pipes.compile()
    base = pipes.agree()
    pipes.load("a")
    with_lora = pipes.agree()
    assert relative_l2(with_lora, base) > 0.01
    assert relative_l2(pipes.agree(), with_lora) < BOUND
    pipes.both(lambda pipe: pipe.unload_lora_weights())
    assert relative_l2(pipes.agree(), base) < BOUND
    assert pipes.ours.transformer.trt_report().builds == 1


def test_an_offloaded_transformer_leaves_the_gpu(files: Path, tmp_path: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    pipes = Pipelines(files, tmp_path)
    pipes.compile()
    pipes.both(lambda pipe: pipe.enable_model_cpu_offload())
    pipes.agree()
    pipes.both(lambda pipe: pipe.maybe_free_model_hooks())
    parameters = list(pipes.ours.transformer.parameters())
    assert {parameter.device.type for parameter in parameters} == {"cpu"}
    gc.collect()
    left = torch.cuda.memory_allocated() - before
    assert left < sum(p.numel() * p.element_size() for p in parameters) / 2, "the fused weights are still on the GPU"
