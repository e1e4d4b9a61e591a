"""A real FluxPipeline from files: the pipeline's own LoRA calls on compiled and eager transformer side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.checkpoint import LORA_RANK, WIDTH, write_tiny_loras, write_tiny_pipeline
from tests.unit.diffusers_pair import LORA_BOUND
from trt_core import compile_transformer, restore_transformer
from trt_core.backends.check import relative_l2
from trt_core.host import Silent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROMPT_TOKENS = 16
EFFECT = 0.01


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write_tiny_pipeline(folder / "pipeline")
    write_tiny_loras(folder / "loras")
    return folder


class Pipelines:
    """Two pipelines from the same files in fp32; the transformer of `ours` is compiled."""

    def __init__(self, files: Path, cache: Path, **options: Any) -> None:
        self.files = files
        self.ours, self.theirs = (
            FluxPipeline.from_pretrained(files / "pipeline", torch_dtype=torch.float32) for _ in range(2)
        )
        for pipe in (self.ours, self.theirs):
            pipe.set_progress_bar_config(disable=True)
        self.options = {"backend": "eager", "cache_folder": str(cache), "progress": Silent(), **options}
        compile_transformer(self.ours, **self.options)

    def both(self, call: Callable[[FluxPipeline], object]) -> None:
        call(self.ours)
        call(self.theirs)

    def load(self, file: str, name: str, **options: Any) -> None:
        self.both(lambda pipe: pipe.load_lora_weights(str(self.files / "loras" / file), adapter_name=name, **options))

    def latents(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        given = {"prompt": "a cat", "height": 64, "width": 96, "num_inference_steps": 2, **arguments}
        return tuple(  # type: ignore[return-value]
            pipe(
                **given, output_type="latent", max_sequence_length=PROMPT_TOKENS,
                generator=torch.Generator().manual_seed(3),
            ).images
            for pipe in (self.ours, self.theirs)
        )  # fmt: skip

    def agree(self, **arguments: Any) -> Tensor:
        """Our latents, after comparing them with diffusers'."""
        seen, expected = self.latents(**arguments)
        assert relative_l2(seen, expected) <= LORA_BOUND
        return seen

    @property
    def report(self) -> Any:
        return self.ours.transformer.trt_report()


@pytest.fixture
def pipes(files: Path, tmp_path: Path) -> Pipelines:
    return Pipelines(files, tmp_path)


def test_pictures_of_any_size_batch_and_guidance(pipes: Pipelines) -> None:
    pipes.agree()
    pipes.agree(height=96, width=64)
    pipes.agree(num_images_per_prompt=2)
    pipes.agree(prompt=["a cat", "a dog in the rain"], guidance_scale=7.0)
    pipes.agree(negative_prompt="a dog", true_cfg_scale=2.0)
    assert pipes.report.builds == 1
    assert pipes.report.eager_blocks == {}


def test_the_pipeline_decodes_what_we_compute(pipes: Pipelines) -> None:
    image = pipes.ours("a cat", height=64, width=96, num_inference_steps=1, max_sequence_length=PROMPT_TOKENS).images[0]
    assert image.size == (96, 64)
    assert isinstance(pipes.ours.transformer, FluxTransformer2DModel)


def test_a_day_of_lora_changes(pipes: Pipelines) -> None:
    base = pipes.agree()
    pipes.load("a.safetensors", "a")
    only_a = pipes.agree()
    assert relative_l2(only_a, base) > EFFECT
    pipes.load("b.safetensors", "b")
    pipes.agree()
    pipes.both(lambda pipe: pipe.set_adapters("b", 0.6))
    only_b = pipes.agree()
    assert relative_l2(only_b, only_a) > EFFECT
    pipes.both(lambda pipe: pipe.set_adapters(["a", "b"], [1.0, -0.5]))
    pipes.agree()
    pipes.both(lambda pipe: pipe.set_adapters(["a"], 0.3))
    pipes.agree()
    pipes.both(lambda pipe: pipe.disable_lora())
    assert torch.equal(pipes.agree(), base)
    pipes.both(lambda pipe: pipe.enable_lora())
    pipes.agree()
    pipes.both(lambda pipe: pipe.set_adapters("b", 0.6))
    assert torch.equal(pipes.agree(), only_b), "A to B is not a fresh B"
    pipes.both(lambda pipe: pipe.delete_adapters("b"))
    pipes.both(lambda pipe: pipe.set_adapters("a"))
    assert torch.equal(pipes.agree(), only_a)
    pipes.both(lambda pipe: pipe.unload_lora_weights())
    assert torch.equal(pipes.agree(), base), "no LoRA is not the base"
    assert pipes.report.builds == 1


def test_fuse_unfuse_and_unload(pipes: Pipelines) -> None:
    pipes.load("a.safetensors", "a")
    pipes.agree()
    pipes.both(lambda pipe: pipe.fuse_lora(lora_scale=0.5))
    pipes.agree()
    pipes.both(lambda pipe: pipe.unfuse_lora())
    pipes.agree()
    pipes.both(lambda pipe: pipe.fuse_lora())
    pipes.both(lambda pipe: pipe.unload_lora_weights())
    pipes.agree()
    pipes.load("b.safetensors", "b")
    pipes.agree()


def test_hotswap(pipes: Pipelines, tmp_path: Path) -> None:
    """The new LoRA's numbers are written into the old adapter's tensors, at the same addresses."""
    pipes.load("a.safetensors", "a")
    before = pipes.agree()
    tensors = load_file(pipes.files / "loras" / "a.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    pipes.both(lambda pipe: pipe.load_lora_weights(str(tmp_path / "other.safetensors"), adapter_name="a", hotswap=True))
    assert relative_l2(pipes.agree(), before) > EFFECT
    pipes.load("a.safetensors", "a", hotswap=True)
    assert torch.equal(pipes.agree(), before)


@pytest.mark.parametrize("scale", [0.0, 0.4, -1.0])
def test_scale_through_the_pipeline(pipes: Pipelines, scale: float) -> None:
    pipes.load("a.safetensors", "a")
    pipes.agree(joint_attention_kwargs={"scale": scale})


def test_a_lora_loaded_before_compiling(files: Path, tmp_path: Path) -> None:
    pipes = Pipelines(files, tmp_path)
    restore_transformer(pipes.ours)
    pipes.load("a.safetensors", "a")
    compile_transformer(pipes.ours, **pipes.options)
    pipes.agree()
    restore_transformer(pipes.ours)
    seen, expected = pipes.latents()
    assert torch.equal(seen, expected)
    assert type(pipes.ours.transformer) is FluxTransformer2DModel


def test_a_control_lora_widens_the_model(pipes: Pipelines, tmp_path: Path) -> None:
    """FLUX.1 Canny's LoRA doubles the input channels: diffusers swaps the first layer, and we bind anew."""
    before = pipes.agree()
    random = torch.Generator().manual_seed(1)
    tensors = {
        "transformer.x_embedder.lora_A.weight": torch.randn(LORA_RANK, 128, generator=random) * 0.1,
        "transformer.x_embedder.lora_B.weight": torch.randn(WIDTH, LORA_RANK, generator=random),
    }
    save_file(tensors, tmp_path / "control.safetensors")
    pipes.both(lambda pipe: pipe.load_lora_weights(str(tmp_path / "control.safetensors"), adapter_name="control"))
    assert pipes.ours.transformer.config.in_channels == 128
    random = torch.Generator().manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(1, 12, 128, generator=random),
        "encoder_hidden_states": torch.randn(1, 5, 64, generator=random),
        "pooled_projections": torch.randn(1, 64, generator=random), "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]), "img_ids": torch.zeros(12, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    with torch.no_grad():
        seen, expected = (pipe.transformer(**inputs).sample for pipe in (pipes.ours, pipes.theirs))
    assert relative_l2(seen, expected) <= LORA_BOUND
    pipes.both(lambda pipe: pipe.unload_lora_weights(reset_to_overwritten_params=True))
    assert torch.equal(pipes.agree(), before)


def test_a_lora_for_another_model_fails_in_diffusers_and_nothing_is_lost(pipes: Pipelines, tmp_path: Path) -> None:
    pipes.load("a.safetensors", "a")
    before = pipes.agree()
    wrong = {name: torch.zeros(3, 3) for name in load_file(pipes.files / "loras" / "a.safetensors")}
    save_file(wrong, tmp_path / "wrong.safetensors")
    for pipe in (pipes.ours, pipes.theirs):
        with pytest.raises((RuntimeError, ValueError)):
            pipe.load_lora_weights(str(tmp_path / "wrong.safetensors"), adapter_name="wrong")
        pipe.set_adapters("a")
    assert torch.equal(pipes.agree(), before)


def test_model_offload_of_the_pipeline_either_works_or_says_why(pipes: Pipelines) -> None:
    """Without an accelerator diffusers itself refuses; the compiled transformer must not stand in the way of that."""
    raised = []
    for pipe in (pipes.ours, pipes.theirs):
        try:
            pipe.enable_model_cpu_offload(device="cpu")
        except (RuntimeError, ValueError) as error:
            raised.append(str(error))
    assert len(raised) in (0, 2)
    pipes.agree()
