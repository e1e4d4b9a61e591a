"""Modulations kept for later steps: the numbers of layer by layer, the bits of computing them, and nothing stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import trt_core
from demo.checkpoint import write_tiny_loras, write_tiny_pipeline
from tests.unit import table_model
from trt_core.flux import modulation_table
from trt_core.host import Silent

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0)
STEPS = 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 5, 32])
@pytest.mark.parametrize("hidden", [48, 640, 3072])
@pytest.mark.parametrize("kind", ["plain", "int8", "row", "tensor", "mixed"])
def test_it_says_what_layer_by_layer_says(kind: str, hidden: int, batch: int, dtype: torch.dtype) -> None:
    if kind in ("row", "tensor") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 below 8.9")
    for ranks in ((), (16,), (4, 128, 19)):
        table_model.check(DEVICE, dtype, hidden, kind, batch, ranks)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write_tiny_pipeline(folder / "pipeline")
    write_tiny_loras(folder / "loras")
    return folder


class Seen:
    """A bf16 pipeline, compiled, and what its table knows."""

    def __init__(self, files: Path, cache: Path, with_schedule: bool, fp8: bool) -> None:
        self.pipe = FluxPipeline.from_pretrained(files / "pipeline", torch_dtype=torch.bfloat16).to("cuda")
        self.pipe.set_progress_bar_config(disable=True)
        if fp8:
            trt_core.quantize_fp8_(self.pipe, progress=Silent())
        given: Any = self.pipe if with_schedule else self.pipe.transformer
        trt_core.compile_transformer(given, backend="eager", cache_folder=str(cache), progress=Silent())

    def latent(self, prompt: str = "a cat", steps: int = STEPS) -> torch.Tensor:
        return self.pipe(
            prompt, height=64, width=96, num_inference_steps=steps, max_sequence_length=16, output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).images  # fmt: skip

    @property
    def known(self) -> int:
        return int((~self.pipe.transformer._trt_state.module._table._keys.isnan().any(1)).sum())


@pytest.mark.parametrize("fp8", [False, True])
def test_a_pipeline_computes_them_once(fp8: bool, files: Path, tmp_path: Path) -> None:
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 below 8.9")
    ours, each_step = (Seen(files, tmp_path, with_schedule, fp8) for with_schedule in (True, False))
    for prompt in ("a cat", "a dog", "a dog"):
        assert torch.equal(ours.latent(prompt), each_step.latent(prompt))
        assert ours.known == STEPS
        assert each_step.known == 1
    for name, weight in (("a", 1.0), ("b", 0.3)):
        for seen in (ours, each_step):
            seen.pipe.load_lora_weights(str(files / "loras" / f"{name}.safetensors"), adapter_name=name)
            seen.pipe.set_adapters(name, weight)
        assert torch.equal(ours.latent(), each_step.latent())
    for seen in (ours, each_step):
        seen.pipe.unload_lora_weights()
    assert torch.equal(ours.latent(), each_step.latent())
    # The largest schedule that one product serves, and one that needs several.
    for steps in (32, 50):
        assert torch.equal(ours.latent(steps=steps), each_step.latent(steps=steps))


def test_a_parameter_changed_in_place_counts_from_the_next_picture_on(files: Path, tmp_path: Path) -> None:
    ours = Seen(files, tmp_path, with_schedule=True, fp8=False)
    before = ours.latent()
    with torch.no_grad():
        ours.pipe.transformer.single_transformer_blocks[0].norm.linear.bias.data.add_(0.5)
    changed = ours.latent()
    assert not torch.equal(before, changed)
    fresh = Seen(files, tmp_path, with_schedule=False, fp8=False)
    with torch.no_grad():
        fresh.pipe.transformer.single_transformer_blocks[0].norm.linear.bias.data.add_(0.5)
    assert torch.equal(fresh.latent(), changed)


def test_the_table_goes_with_its_weights(files: Path, tmp_path: Path) -> None:
    ours = Seen(files, tmp_path, with_schedule=True, fp8=False)
    ours.latent()
    module = ours.pipe.transformer._trt_state.module
    assert module.table_bytes > modulation_table.SLOTS * module.arch.hidden
    ours.pipe.to("cpu")
    assert module.table_bytes == 0
    ours.pipe.to("cuda")
    ours.latent()
    assert ours.known == STEPS


def test_wide_batches_and_fp32_run_layer_by_layer(files: Path, tmp_path: Path) -> None:
    table = table_model
    arch = table.architecture(48)
    weights = table.weights_of(arch, "plain", torch.float32, DEVICE)
    assert "float32" in str(modulation_table.why_no_table(weights, arch, torch.float32))
    on_cpu = {name: weight.cpu() for name, weight in weights.items()}
    assert modulation_table.why_no_table(on_cpu, arch, torch.float32) == "the model is not on a GPU"
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    assert modulation_table.why_no_table(half, arch, torch.bfloat16) is None
    name = "double_blocks.0.img_mod.lin.weight"
    odd = torch.empty(half[name].numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view_as(half[name])
    assert "odd address" in str(modulation_table.why_no_table({**half, name: odd}, arch, torch.bfloat16))
    assert not modulation_table.ModulationTable(half, arch, torch.bfloat16).takes(33)
