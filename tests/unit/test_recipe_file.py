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
from torch import Tensor

from tests.unit.tiny_flux import bfl_weights, tiny_transformer
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
    same_recipe,
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


def means(arch: FluxArchitecture, **numbers: int) -> dict[str, Tensor]:
    matrices = bfl_weights(tiny_transformer(**numbers))
    return {name: torch.randn(matrices[f"{name}.weight"].shape[1]) for name in block_linears(arch)}


def recipe_with_means(arch: FluxArchitecture, activations: Activations) -> Fp8Recipe:
    if activations is Activations.DYNAMIC:
        return plan_recipe(arch, Fp8Config(exclude=("*.linear2",)), input_mean=means(arch))
    plain = static_recipe(arch)
    return plan_recipe(arch, plain.config, plain.input_amax, means(arch))


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


@pytest.mark.parametrize("activations", Activations)
def test_means_come_back_exactly(arch: FluxArchitecture, activations: Activations, tmp_path: Path) -> None:
    recipe = recipe_with_means(arch, activations)
    loaded = load_recipe(save_recipe(tmp_path / "a.safetensors", recipe, arch), arch)
    assert loaded.input_mean.keys() == recipe.activation_linears
    assert same_recipe(loaded, recipe)


def test_means_are_fp32_vectors_in_the_file(arch: FluxArchitecture, tmp_path: Path) -> None:
    """Views of one tensor too, which safetensors does not write as they are."""
    planned = plan_recipe(arch, Fp8Config())
    widths = {name: len(mean) for name, mean in means(arch).items() if not is_modulation(name)}
    whole = torch.randn(len(widths), 2 * max(widths.values()))
    views = {name: whole[i, : 2 * width : 2] for i, (name, width) in enumerate(widths.items())}
    recipe = Fp8Recipe(planned.config, planned.linears, {}, views)
    path = save_recipe(tmp_path / "a.safetensors", recipe, arch)
    with safe_open(path, framework="pt") as file:
        stored = file.get_tensor("double_blocks.1.img_mlp.2.input_mean")
        assert file.metadata()["version"] == "2"
    assert (stored.dtype, stored.shape) == (torch.float32, (widths["double_blocks.1.img_mlp.2"],))
    assert torch.equal(stored, views["double_blocks.1.img_mlp.2"])


def test_a_file_of_version_1_still_loads(arch: FluxArchitecture, saved: Path) -> None:
    """What the program wrote before there were means: the same tensors and metadata, but the number."""
    with safe_open(saved, framework="pt") as file:
        assert all(name.endswith(".input_amax") for name in file.keys())  # noqa: SIM118
    before = load_recipe(saved, arch)
    loaded = load_recipe(rewritten(saved, version="1"), arch)
    assert loaded == before
    assert len(loaded.input_amax) == 10
    assert not loaded.input_mean


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
        ({"version": "3"}, "format version 3.*reads versions 1 and 2"),
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


def with_means(path: Path, arch: FluxArchitecture, changes: dict[str, Tensor | None]) -> Path:
    """A file of a dynamic recipe with other tensors; None takes one out."""
    save_recipe(path, recipe_with_means(arch, Activations.DYNAMIC), arch)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({n: t for n, t in {**tensors, **changes}.items() if t is not None}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("layer", "mean", "text"),
    [
        (
            "double_blocks.1.txt_mlp.0",
            torch.full((64,), float("nan")),
            "mean input of nan in double_blocks.1.txt_mlp.0",
        ),
        (
            "double_blocks.1.txt_mlp.0",
            torch.full((64,), float("inf")),
            "mean input of inf in double_blocks.1.txt_mlp.0",
        ),
        ("double_blocks.1.txt_mlp.0", torch.zeros(65), "has shape.*its 64 inputs"),
        ("double_blocks.1.txt_mlp.0", torch.tensor(1.0), "has shape"),
        ("double_blocks.1.txt_mlp.0", None, "no mean input; the first is double_blocks.1.txt_mlp.0"),
        ("double_blocks.9.txt_mlp.0", torch.zeros(64), "another model.*double_blocks.9.txt_mlp.0"),
        ("double_blocks.1.txt_mod.lin", torch.zeros(64), "double_blocks.1.txt_mod.lin.*not in FP8"),
        ("single_blocks.0.linear2", torch.zeros(320), "single_blocks.0.linear2.*not in FP8"),
    ],
)
def test_means_that_do_not_fit_are_refused(
    arch: FluxArchitecture, tmp_path: Path, layer: str, mean: Tensor | None, text: str
) -> None:
    path = with_means(tmp_path / "means.safetensors", arch, {f"{layer}.input_mean": mean})
    with pytest.raises(InvalidFile, match=rf"means.safetensors: .*{text}"):
        load_recipe(path, arch)


def test_a_range_of_several_numbers_is_damage(arch: FluxArchitecture, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["double_blocks.1.txt_mlp.0.input_amax"] = torch.ones(3)
    save_file(tensors, saved, metadata=metadata)
    with pytest.raises(InvalidFile, match="damaged"):
        load_recipe(saved, arch)


def test_means_of_another_architecture_are_refused(arch: FluxArchitecture, tmp_path: Path) -> None:
    wide = architecture(heads=3)
    recipe = plan_recipe(wide, Fp8Config(), input_mean=means(wide, heads=3))
    with pytest.raises(InvalidOption, match="has shape"):
        save_recipe(tmp_path / "a.safetensors", recipe, arch)
    assert not list(tmp_path.iterdir())
