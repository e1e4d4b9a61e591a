"""A recipe survives its file, and no damaged or foreign file is taken for one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.unit.tiny_flux import tiny_transformer
from trt_core.errors import InvalidFile, InvalidOption
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import (
    Activations,
    Fp8Config,
    Fp8Recipe,
    Granularity,
    block_linears,
    is_modulation,
    plan_recipe,
)
from trt_core.recipe_file import load_recipe, save_recipe


def architecture(**numbers: int) -> FluxArchitecture:
    return FluxArchitecture.from_diffusers_config(dict(tiny_transformer(**numbers).config))


@pytest.fixture(scope="module")
def arch() -> FluxArchitecture:
    return architecture()


def static_recipe(arch: FluxArchitecture) -> Fp8Recipe:
    names = [name for name in block_linears(arch) if not is_modulation(name)]
    amax = dict(zip(names, (torch.rand(len(names)) * 50 + 0.1).tolist(), strict=True))
    config = Fp8Config(Granularity.TENSOR, Activations.STATIC, ("*.linear2", "double_blocks.0.*"), 1.75)
    return plan_recipe(arch, config, amax)


@pytest.fixture
def saved(arch: FluxArchitecture, tmp_path: Path) -> Path:
    return save_recipe(tmp_path / "scales.safetensors", static_recipe(arch), arch)


def rewritten(path: Path, **changes: str | None) -> Path:
    """The same file with other metadata; None takes an entry out."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {name: text for name, text in {**metadata, **changes}.items() if text is not None}
    save_file(tensors, path, metadata=metadata)
    return path


def test_static_recipe_comes_back_exactly(arch: FluxArchitecture, tmp_path: Path) -> None:
    recipe = static_recipe(arch)
    assert load_recipe(save_recipe(tmp_path / "a.safetensors", recipe, arch), arch) == recipe


def test_dynamic_recipe_comes_back_exactly(arch: FluxArchitecture, tmp_path: Path) -> None:
    recipe = plan_recipe(arch, Fp8Config(exclude=("*linear1",)))
    assert load_recipe(save_recipe(str(tmp_path / "a.safetensors"), recipe, arch), arch) == recipe


def test_the_file_is_plain_safetensors_with_json(arch: FluxArchitecture, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        assert file.get_tensor("double_blocks.1.img_attn.qkv.input_amax").dtype == torch.float32
        config = json.loads(file.metadata()["config"])
    assert config == {
        "granularity": "tensor", "activations": "static", "exclude": ["*.linear2", "double_blocks.0.*"],
        "headroom": 1.75,
    }  # fmt: skip
    assert saved.stat().st_size < 10_000


def test_saving_replaces_and_leaves_nothing_else(arch: FluxArchitecture, saved: Path) -> None:
    save_recipe(saved, plan_recipe(arch, Fp8Config()), arch)
    assert load_recipe(saved, arch).config == Fp8Config()
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_does_not_exist_is_an_error(arch: FluxArchitecture, tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="cannot be written"):
        save_recipe(tmp_path / "nowhere" / "a.safetensors", plan_recipe(arch, Fp8Config()), arch)


def test_a_recipe_of_another_model_is_not_saved(arch: FluxArchitecture, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="another model"):
        save_recipe(tmp_path / "a.safetensors", plan_recipe(architecture(single=3), Fp8Config()), arch)
    assert not list(tmp_path.iterdir())


def test_loading_imports_neither_modelopt_nor_diffusers(arch: FluxArchitecture, saved: Path) -> None:
    code = (
        "import sys\n"
        "from trt_core.flux.architecture import FluxArchitecture\n"
        "from trt_core.recipe_file import load_recipe\n"
        f"recipe = load_recipe({str(saved)!r}, {arch!r})\n"
        "print(len(recipe.input_amax), [name for name in ('modelopt', 'diffusers') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "10 []"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"single": 3}, "single_depth is 2, this model's is 3"),
        ({"double": 1}, "double_depth is 2, this model's is 1"),
        ({"heads": 3}, "heads is 2, this model's is 3"),
        ({"in_channels": 384, "out_channels": 64}, "in_channels is 64, this model's is 384"),
    ],
)
def test_a_file_for_another_architecture_is_refused(saved: Path, numbers: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidFile, match=rf"scales.safetensors was made for another model.*{text}"):
        load_recipe(saved, architecture(**numbers))


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_a_truncated_file_is_refused(arch: FluxArchitecture, saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(InvalidFile, match="truncated"):
        load_recipe(saved, arch)


def test_files_of_another_kind_are_refused(arch: FluxArchitecture, tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="no FP8 recipe at"):
        load_recipe(tmp_path / "missing.safetensors", arch)
    save_file({"weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    with pytest.raises(InvalidFile, match="holds no FP8 recipe"):
        load_recipe(tmp_path / "lora.safetensors", arch)
    (tmp_path / "text.safetensors").write_text("{}" * 50)
    with pytest.raises(InvalidFile, match="no safetensors"):
        load_recipe(tmp_path / "text.safetensors", arch)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": "2"}, "format version 2.*reads version 1"),
        ({"version": None}, "format version None"),
        ({"format": "other"}, "holds no FP8 recipe"),
        ({"config": "{"}, "damaged"),
        ({"config": "[]"}, "damaged"),
        ({"config": None}, "damaged"),
        (
            {"config": json.dumps({"granularity": "block", "activations": "static", "exclude": [], "headroom": 2})},
            "dam",
        ),
        ({"config": json.dumps({"granularity": "row", "activations": "static", "exclude": [], "headroom": 0})}, "dam"),
        ({"architecture": "[]"}, "another model"),
        ({"linears": json.dumps(["double_blocks.9.img_attn.qkv"])}, "another model"),
        ({"linears": "[]"}, "empty"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(
    arch: FluxArchitecture, saved: Path, changes: dict[str, str | None], text: str
) -> None:
    with pytest.raises(InvalidFile, match=text):
        load_recipe(rewritten(saved, **changes), arch)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_ranges_without_a_scale_are_refused(arch: FluxArchitecture, saved: Path, bad: float) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["double_blocks.1.txt_mlp.0.input_amax"] = torch.tensor(bad)
    save_file(tensors, saved, metadata=metadata)
    with pytest.raises(InvalidFile, match=r"double_blocks.1.txt_mlp.0"):
        load_recipe(saved, arch)
