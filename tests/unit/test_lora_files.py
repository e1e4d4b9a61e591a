"""LoRA files from disk: what is read, what is refused and why."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.lora_files import BASE, HIDDEN, PROJ, QKV, SHAPES, factors, flat, kohya, peft, write
from trt_core.errors import InvalidFile, LoraMismatch
from trt_core.lora import LoraFormat, fingerprint, load_lora, merged

DOWN, UP = factors((HIDDEN, HIDDEN), 2, seed=1)
GOOD = kohya(f"lora_unet_{flat(PROJ)}", DOWN, UP, alpha=1)
TEXT = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}


def test_a_good_file_is_described_and_merges(tmp_path: Path) -> None:
    qkv = kohya(f"lora_unet_{flat(QKV)}", *factors((3 * HIDDEN, HIDDEN), 33, seed=2))
    path = write(tmp_path / "my cat.safetensors", GOOD | qkv | TEXT, {"ss_network_module": "networks.lora_flux"})
    lora = load_lora(str(path), SHAPES)
    assert (lora.path, lora.name, lora.format) == (path, "my cat", LoraFormat.KOHYA)
    assert (lora.ranks, lora.text_encoder_keys) == ((2, 33), 1)
    assert lora.weights == {f"{PROJ}.weight", f"{QKV}.weight"}
    assert lora.metadata == {"ss_network_module": "networks.lora_flux"}
    assert lora.size_bytes == path.stat().st_size
    assert lora.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    (patch,) = (patch for patch in lora.patches if patch.weight == f"{PROJ}.weight")
    weight = BASE[f"{PROJ}.weight"]
    torch.testing.assert_close(merged(weight, [(patch, -0.4)]), weight - 0.4 * 0.5 * UP @ DOWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_keep_the_files_dtype_and_merge_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in peft(PROJ, DOWN, UP).items()}
    (patch,) = load_lora(write(tmp_path / "a.safetensors", tensors), SHAPES).patches
    assert patch.change.down.dtype == dtype
    expected = UP.to(dtype).double() @ DOWN.to(dtype).double()
    torch.testing.assert_close(merged(torch.zeros(HIDDEN, HIDDEN), [(patch, 1.0)]), expected.float())


def test_to_moves_all_factors_once(tmp_path: Path) -> None:
    lora = load_lora(write(tmp_path / "a.safetensors", GOOD), SHAPES)
    (moved,) = lora.to("meta").patches
    assert moved.change.down.is_meta
    assert moved.change.up.is_meta
    (same,) = lora.to("cpu").patches
    assert same.change.down.data_ptr() == lora.patches[0].change.down.data_ptr()
    assert (lora.to("meta").fingerprint, lora.to("meta").ranks) == (lora.fingerprint, lora.ranks)


def test_a_loaded_lora_does_not_change_when_a_trainer_saves_over_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", GOOD)
    (patch,) = load_lora(path, SHAPES).patches
    with path.open("r+b") as file:
        file.seek(-4 * 16, 2)
        file.write(bytes(4 * 16))
    assert torch.equal(patch.change.down, DOWN)
    assert torch.equal(patch.change.up, UP)


def test_alpha_is_read_from_the_config_in_the_file(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})}
    tensors = peft("transformer.transformer_blocks.0.attn.to_q", DOWN, UP)
    (patch,) = load_lora(write(tmp_path / "a.safetensors", tensors, metadata), SHAPES).patches
    assert patch.change.scale == 4.0


def test_fingerprint_tells_one_changed_byte(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(3_000_000))
    before = fingerprint(path)
    path.write_bytes(bytes(2_999_999) + b"\x01")
    assert before == hashlib.sha256(bytes(3_000_000)).hexdigest()
    assert fingerprint(path) != before


def test_a_file_for_text_encoders_only_is_loaded_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trt_core.lora"):
        lora = load_lora(write(tmp_path / "text.safetensors", TEXT), SHAPES)
    assert (lora.patches, lora.format, lora.text_encoder_keys) == ((), LoraFormat.TEXT_ENCODER, 1)
    assert "changes nothing in the FLUX transformer" in caplog.text
    assert "1 tensors for text encoders" in caplog.text


def refusal(path: Path) -> InvalidFile:
    with pytest.raises(InvalidFile) as caught:
        load_lora(path, SHAPES)
    assert path.name in str(caught.value)
    assert caught.value.fix or caught.value.expected
    return caught.value


def test_a_missing_file(tmp_path: Path) -> None:
    assert "No such file" in str(refusal(tmp_path / "missing.safetensors"))


def test_a_folder(tmp_path: Path) -> None:
    assert "is a folder" in str(refusal(tmp_path))


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    assert "is empty" in str(refusal(tmp_path / "empty.safetensors"))


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "pickle"])
def test_pickle_files_are_refused_with_the_reason_and_never_opened(
    tmp_path: Path, suffix: str, old_format: bool
) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(GOOD, path, _use_new_zipfile_serialization=not old_format)
    text = str(refusal(path))
    assert "Pickle files can run any program" in text
    assert ".safetensors" in text


def test_a_pickle_with_the_wrong_name_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save(GOOD, path)
    assert "It is a pickle or zip file" in str(refusal(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "GGUF"),
        (b"hello", "not a safetensors file"),
    ],
)
def test_other_files_are_told_by_their_start(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert reason in str(refusal(path))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, kept: float) -> None:
    path = write(tmp_path / "a.safetensors", GOOD)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "truncated or damaged" in str(refusal(path))


def test_a_header_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 8) + b"{broken!" + bytes(8))
    assert "truncated or damaged" in str(refusal(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused_and_the_key_is_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors: dict[str, Tensor] = {key: tensor.to(dtype) for key, tensor in GOOD.items()}
    bad = f"lora_unet_{flat(PROJ)}.lora_up.weight"
    tensors[bad][3, 1] = value
    error = refusal(write(tmp_path / "a.safetensors", tensors))
    assert bad in str(error)
    assert "NaN or infinity" in str(error)


def test_nan_in_an_fp8_file(tmp_path: Path) -> None:
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in peft(PROJ, DOWN, UP).items()}
    tensors[f"{PROJ}.lora_B.weight"].view(torch.uint8)[0, 0] = 0x7F
    assert "NaN or infinity" in str(refusal(write(tmp_path / "a.safetensors", tensors)))


def test_a_file_without_lora_keys(tmp_path: Path) -> None:
    assert "looks like a checkpoint" in str(refusal(write(tmp_path / "flux.safetensors", BASE)))
    assert "No key of this file belongs to a LoRA" in str(
        refusal(write(tmp_path / "vae.safetensors", {"latents": torch.ones(3)}))
    )
    assert "it holds no tensors" in str(refusal(write(tmp_path / "nothing.safetensors", {})))


def test_a_mismatch_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "sdxl.safetensors", {"lora_unet_input_blocks_1_0_emb_layers_1.alpha": torch.ones(())})
    with pytest.raises(LoraMismatch, match=r"sdxl\.safetensors: 1 of 1 LoRA keys"):
        load_lora(path, SHAPES)
