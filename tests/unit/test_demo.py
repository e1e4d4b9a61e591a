"""The demo: its checkpoint is a real FLUX pipeline, its LoRAs change the picture, and its numbers come from running."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo import pipeline
from demo.checkpoint import write_tiny_loras, write_tiny_pipeline
from demo.flow import run
from demo.options import Options, Size, parse
from demo.phases import Text, encode, picture, relative_error, story
from demo.sheet import contact_sheet
from demo.table import as_json, table, text
from trt_core.errors import InvalidFile, InvalidOption, LoraMismatch, UnsupportedModel

ROOT = Path(__file__).parents[2]
# `dtype` is unknown to the oldest diffusers that is supported; two adapters are what the test is about.
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype`", "ignore:Already found a `peft_config`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline.quiet()
    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_tiny_loras(tmp_path_factory.mktemp("loras"), seed=0)


@pytest.fixture
def pipe(folder: Path) -> FluxPipeline:
    return pipeline.load(str(folder), torch.float32)


def latents(pipe: FluxPipeline, prompt: str = "a red cat") -> Tensor:
    return pipe(
        prompt,
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images


def test_tokenizers_know_words_and_spell_others(pipe: FluxPipeline) -> None:
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        known, spelled = (len(tokenizer(word).input_ids) for word in ("castle", "zebra"))
        assert known < spelled
        assert "red castle" in tokenizer.decode(tokenizer("red castle").input_ids)


def test_the_prompt_matters(pipe: FluxPipeline) -> None:
    red, blue = latents(pipe), latents(pipe, "a blue castle")
    assert torch.isfinite(red).all()
    assert relative_error(blue, red) > 0.1


def test_every_weight_of_the_transformer_matters(pipe: FluxPipeline) -> None:
    model, random = pipe.transformer, torch.Generator().manual_seed(0)
    output = model(
        hidden_states=torch.randn(1, 16, 64, generator=random),
        encoder_hidden_states=torch.randn(1, 8, 64, generator=random),
        pooled_projections=torch.randn(1, 64, generator=random),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
        .flatten(0, 2)
        .contiguous(),
        txt_ids=torch.zeros(8, 3),
    ).sample
    output.square().mean().backward()
    assert output.std() > 0.5
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []


def test_equal_seeds_give_equal_weights(folder: Path, tmp_path: Path) -> None:
    name = "transformer/diffusion_pytorch_model.safetensors"
    same = load_file(write_tiny_pipeline(tmp_path / "same") / name)
    other = load_file(write_tiny_pipeline(tmp_path / "other", seed=1) / name)
    for key, weight in load_file(folder / name).items():
        assert torch.equal(weight, same[key])
        assert not torch.equal(weight, other[key])


def test_decoded_pictures_have_contrast(pipe: FluxPipeline) -> None:
    image = picture(pipe, latents(pipe), Size(64, 64))
    assert image.size == (64, 64)
    dark, bright = zip(*image.getextrema(), strict=True)
    assert max(dark) < 64
    assert min(bright) > 192


def test_loras_change_the_picture_and_leave_nothing_behind(pipe: FluxPipeline, loras: list[Path]) -> None:
    none = latents(pipe)
    taken = {}
    for name, path in zip("ab", loras, strict=True):
        pipeline.add_lora(pipe, path, name)
        pipe.set_adapters(name)
        taken[name] = latents(pipe)
    pipe.unload_lora_weights()
    assert relative_error(taken["a"], none) > 0.2
    assert relative_error(taken["b"], none) > 0.2
    assert relative_error(taken["a"], taken["b"]) > 0.2
    assert torch.equal(latents(pipe), none)


def test_lora_files_have_two_formats(loras: list[Path]) -> None:
    diffusers_keys, kohya_keys = (set(load_file(path)) for path in loras)
    assert all(key.startswith("transformer.") and ".lora_" in key for key in diffusers_keys)
    assert all(key.startswith("lora_unet_") for key in kohya_keys)
    assert any(key.endswith(".alpha") for key in kohya_keys)


def test_encoding_drops_the_large_encoder(pipe: FluxPipeline) -> None:
    encoded = encode(pipe, "a red cat", torch.device("cpu"))
    assert isinstance(encoded, Text)
    assert encoded.prompt_embeds.shape == (1, 64, 64)
    assert pipe.text_encoder_2 is None


@pytest.mark.parametrize(("size", "other"), [("1024x1024", "832x1216"), ("128x128", "96x160"), ("16x16", "16x32")])
def test_another_resolution_is_a_multiple_of_16_and_differs(size: str, other: str) -> None:
    assert str(Size.parse(size).other()) == other


def test_the_story_passes_through_all_loras() -> None:
    size = Size(64, 64)
    assert [(phase.title, phase.lora) for phase in story(size, 2)] == [
        ("first call", None),
        ("later call", None),
        ("LoRA A", 0),
        ("A to B", 1),
        ("B to none", None),
        ("new resolution", None),
    ]
    assert [phase.title for phase in story(size, 0)] == ["first call", "later call", "new resolution"]
    assert story(size, 1)[-1].size != size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100x128"], "multiples of 16"),
        (["--size", "large"], "1024x768"),
        (["--backend", "turbo"], "'inductor'"),
        (["--backend", "mttm"], "segments"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_wrong_options_say_what_is_right(arguments: list[str], words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        parse(arguments)


def test_a_missing_lora_is_named() -> None:
    with pytest.raises(InvalidFile, match=r"nowhere\.safetensors"):
        parse(["--lora", "nowhere.safetensors"])


@pytest.mark.parametrize("arguments", [["--size", "100x128"], ["--lora", "nowhere.safetensors"]])
def test_mistakes_end_with_one_line_and_code_2(arguments: list[str], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "demo", "--out", str(tmp_path), *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = [sys.executable, "-m", "demo", "--out", str(tmp_path / "file" / "out")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be made" in done.stderr


def test_models_that_are_no_flux_pipeline(tmp_path: Path) -> None:
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UnsupportedModel, match="StableDiffusionPipeline"):
        pipeline.load(str(tmp_path / "sd"), torch.float32)
    with pytest.raises(InvalidFile, match="does not exist"):
        pipeline.load(str(tmp_path / "nowhere"), torch.float32)
    with pytest.raises(InvalidFile, match=r"model_index\.json"):
        pipeline.load(str(tmp_path), torch.float32)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "flux")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidFile, match="could not be loaded"):
        pipeline.load(str(folder), torch.float32)


def test_loras_are_checked_before_anything_is_compiled(pipe: FluxPipeline, loras: list[Path], tmp_path: Path) -> None:
    pipeline.check_loras(pipe, loras)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(loras[0].read_bytes()[:500])
    with pytest.raises(InvalidFile, match=r"broken\.safetensors"):
        pipeline.check_loras(pipe, [broken])
    wide = tmp_path / "wide.safetensors"
    tensors = load_file(loras[0])
    save_file({key: torch.cat([weight, weight], dim=1) for key, weight in tensors.items()}, wide)
    with pytest.raises(LoraMismatch, match=r"wide\.safetensors"):
        pipeline.check_loras(pipe, [wide])


def test_the_whole_demonstration(tmp_path: Path) -> None:
    options: Options = parse(["--size", "64x64", "--steps", "2", "--backend", "eager", "--out", str(tmp_path)])
    result, pipe = run(options)
    numbers = json.loads(json.dumps(as_json(result, options)))
    assert [phase["phase"] for phase in numbers["phases"]] == [phase.title for phase in story(options.size, 2)]
    assert all(phase["error"] < 1e-4 for phase in numbers["phases"])
    assert numbers["restored_error"] == 0
    assert 0 < numbers["noise_floor"] < 1e-4
    # A touches 2 x 8 + 3 x 2 fused matrices and B 2 x 6 + 3 x 2; loading B takes A away first.
    assert [phase["layers_written"] for phase in numbers["phases"]] == [None, None, 22, 22 + 18, 18, None]
    assert {"double_qkv", "single_out"} <= set(numbers["segments"])
    compiled = {row.phase.title: row.compiled.latents for row in result.rows}
    assert relative_error(compiled["LoRA A"], compiled["later call"]) > 0.2
    assert torch.equal(compiled["B to none"], compiled["first call"])
    assert type(pipe.transformer).__mro__[0].__module__.startswith("diffusers")
    assert "new resolution" in text(result)


def test_the_contact_sheet_shows_all_pictures_whole(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (64, 128), (255, 0, 0)), Image.new("RGB", (128, 128), (0, 0, 255))
    captions = [("tall", "64x128"), ("square", "128x128")]
    path = contact_sheet(captions, [("eager", [red, blue]), ("compiled", [red, blue])], tmp_path / "new" / "sheet.png")
    with Image.open(path) as sheet:
        colours = {colour: count for count, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert colours[0, 0, 255] == 2 * 224 * 224
    assert colours[255, 0, 0] > 2 * 112 * 220


def test_table_aligns_words_left_and_numbers_right() -> None:
    assert table(("phase", "ms"), [("first", "12.5"), ("A", "-")]) == [
        "phase    ms",
        "-----  ----",
        "first  12.5",
        "A         -",
    ]
