"""Which layers a recipe takes, by either program's names, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from tests.unit.tiny_flux import bfl_weights, tiny_transformer
from trt_core.calibrated_numbers import check_amax, check_means
from trt_core.errors import InvalidOption
from trt_core.flux.architecture import FluxArchitecture
from trt_core.fp8_recipe import (
    Activations,
    Fp8Config,
    Fp8Recipe,
    Granularity,
    block_linears,
    check_recipe,
    diffusers_linears,
    is_modulation,
    plan_recipe,
    same_recipe,
)

STATIC = Fp8Config(activations=Activations.STATIC)


@pytest.fixture(scope="module")
def arch() -> FluxArchitecture:
    return FluxArchitecture.from_diffusers_config(dict(tiny_transformer().config))


def full_amax(arch: FluxArchitecture) -> dict[str, float]:
    return {name: 1.0 + index for index, name in enumerate(block_linears(arch)) if not is_modulation(name)}


def full_means(arch: FluxArchitecture, seed: int = 0) -> dict[str, Tensor]:
    """Of every layer, modulations too, as long as the rows of its matrix in the model itself."""
    random = torch.Generator().manual_seed(seed)
    matrices = bfl_weights(tiny_transformer(single=arch.single_depth))
    return {
        name: torch.randn(matrices[f"{name}.weight"].shape[1], generator=random) for name in block_linears(arch)
    }  # fmt: skip


def test_every_block_matrix_is_in_the_default_recipe(arch: FluxArchitecture) -> None:
    matrices = {name for name, tensor in bfl_weights(tiny_transformer()).items() if tensor.ndim == 2}
    blocks = {name.removesuffix(".weight") for name in matrices if "_blocks." in name}
    assert plan_recipe(arch, Fp8Config()).linears == blocks
    assert len(blocks) == 2 * 10 + 2 * 3
    assert {"single_blocks.1.linear2", "double_blocks.0.txt_mod.lin", "single_blocks.0.modulation.lin"} <= blocks


def test_modulations_are_weight_only(arch: FluxArchitecture) -> None:
    recipe = plan_recipe(arch, STATIC, full_amax(arch))
    weight_only = recipe.linears - recipe.activation_linears
    assert {name.split(".", 2)[2] for name in weight_only} == {"img_mod.lin", "txt_mod.lin", "modulation.lin"}
    assert set(recipe.input_amax) == recipe.activation_linears


def test_diffusers_modules_of_each_linear_exist_and_share_the_rows(arch: FluxArchitecture) -> None:
    model, weights = tiny_transformer(), bfl_weights(tiny_transformer())
    for name, modules in diffusers_linears(arch).items():
        rows = sum(model.get_submodule(module).weight.shape[0] for module in modules)
        assert rows == weights[f"{name}.weight"].shape[0]


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("single_blocks.*.linear2", {"single_blocks.0.linear2", "single_blocks.1.linear2"}),
        ("*single*proj_out", {"single_blocks.0.linear2", "single_blocks.1.linear2"}),
        ("transformer_blocks.1.attn.to_k", {"double_blocks.1.img_attn.qkv"}),
        ("single_transformer_blocks.0.attn.to_v", {"single_blocks.0.linear1"}),
        ("double_blocks.0.???_mlp.[02]", {f"double_blocks.0.{s}_mlp.{n}" for s in ("img", "txt") for n in (0, 2)}),
        ("x_embedder", set()),
    ],
)
def test_a_pattern_excludes_by_either_name(arch: FluxArchitecture, pattern: str, excluded: set[str]) -> None:
    recipe = plan_recipe(arch, Fp8Config(exclude=(pattern,)))
    assert set(block_linears(arch)) - recipe.linears == excluded


def test_patterns_add_up(arch: FluxArchitecture) -> None:
    recipe = plan_recipe(arch, Fp8Config(exclude=("*.linear1", "double_blocks.*")))
    assert recipe.linears == {f"single_blocks.{i}.{name}" for i in (0, 1) for name in ("linear2", "modulation.lin")}


def test_a_pattern_that_matches_nothing_is_an_error_that_helps(arch: FluxArchitecture) -> None:
    with pytest.raises(
        InvalidOption, match=r"'single_blocks.0.linear3'.*matches no layer.*single_blocks.0.linear"
    ) as e:
        plan_recipe(arch, Fp8Config(exclude=("single_blocks.0.linear3",)))
    assert e.value.widget == "exclude"


def test_patterns_that_leave_nothing_are_an_error(arch: FluxArchitecture) -> None:
    with pytest.raises(InvalidOption, match="leave no layer"):
        plan_recipe(arch, Fp8Config(exclude=("*",)))


def test_scale_is_amax_times_headroom_over_448(arch: FluxArchitecture) -> None:
    amax = full_amax(arch)
    recipe = plan_recipe(arch, Fp8Config(activations=Activations.STATIC, headroom=1.5), amax)
    name = "double_blocks.1.txt_mlp.2"
    assert recipe.input_limit(name) == amax[name] * 1.5
    assert recipe.input_scale(name) == amax[name] * 1.5 / 448


def test_dynamic_recipes_and_modulations_have_no_input_scale(arch: FluxArchitecture) -> None:
    with pytest.raises(InvalidOption, match="no static input scale"):
        plan_recipe(arch, Fp8Config()).input_scale("single_blocks.0.linear1")
    with pytest.raises(InvalidOption, match="modulations never"):
        plan_recipe(arch, STATIC, full_amax(arch)).input_scale("single_blocks.0.modulation.lin")


def test_amax_of_excluded_layers_and_modulations_is_left_out(arch: FluxArchitecture) -> None:
    config = Fp8Config(activations=Activations.STATIC, exclude=("*.linear2",))
    recipe = plan_recipe(arch, config, {**full_amax(arch), "single_blocks.0.modulation.lin": 3.0})
    assert set(recipe.input_amax) == recipe.activation_linears
    assert not any(name.endswith(("linear2", "modulation.lin")) for name in recipe.input_amax)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_means_of_excluded_layers_and_modulations_are_left_out(arch: FluxArchitecture, static: bool) -> None:
    activations = Activations.STATIC if static else Activations.DYNAMIC
    means = full_means(arch)
    recipe = plan_recipe(
        arch, Fp8Config(activations=activations, exclude=("*.linear2",)), full_amax(arch) if static else None, means
    )
    assert set(recipe.input_mean) == recipe.activation_linears
    assert not any(name.endswith(("linear2", "_mod.lin", "modulation.lin")) for name in recipe.input_mean)
    assert all(torch.equal(mean, means[name]) for name, mean in recipe.input_mean.items())
    check_recipe(recipe, arch)


def test_without_means_a_recipe_has_none(arch: FluxArchitecture) -> None:
    assert not plan_recipe(arch, Fp8Config()).input_mean
    assert not plan_recipe(arch, STATIC, full_amax(arch), {}).input_mean


def test_means_become_fp32_copies(arch: FluxArchitecture) -> None:
    means = {name: mean.double() for name, mean in full_means(arch).items()}
    with torch.inference_mode():
        kept = plan_recipe(arch, Fp8Config(), input_mean=means).input_mean["single_blocks.0.linear2"]
    assert kept.dtype is torch.float32
    assert not kept.is_inference()
    single = full_means(arch)
    recipe = plan_recipe(arch, Fp8Config(), input_mean=single)
    before = single["single_blocks.0.linear2"].clone()
    single["single_blocks.0.linear2"].zero_()
    assert torch.equal(recipe.input_mean["single_blocks.0.linear2"], before)


def test_some_means_alone_are_refused(arch: FluxArchitecture) -> None:
    means = full_means(arch)
    del means["single_blocks.1.linear1"], means["single_blocks.1.modulation.lin"]
    with pytest.raises(InvalidOption, match=r"1 of 20 have no mean input; the first is single_blocks.1.linear1"):
        plan_recipe(arch, Fp8Config(), input_mean=means)
    assert plan_recipe(arch, Fp8Config(exclude=("single_blocks.1.linear1",)), input_mean=means).input_mean


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_mean_that_is_no_number_is_named(arch: FluxArchitecture, bad: float) -> None:
    means = full_means(arch)
    means["double_blocks.1.img_mlp.2"][3] = bad
    with pytest.raises(InvalidOption, match=rf"mean input of {bad} in double_blocks.1.img_mlp.2.*finite"):
        plan_recipe(arch, Fp8Config(), input_mean=means)


@pytest.mark.parametrize("length", [(63,), (256,), (), (1, 64), (0,)])
def test_a_mean_of_another_length_is_named(arch: FluxArchitecture, length: tuple[int, ...]) -> None:
    means = {**full_means(arch), "double_blocks.1.img_attn.proj": torch.zeros(length)}
    with pytest.raises(InvalidOption, match=r"mean input of double_blocks.1.img_attn.proj has shape.*its 64 inputs"):
        check_means(arch, means)


def test_means_of_another_model_are_refused(arch: FluxArchitecture) -> None:
    deeper = FluxArchitecture.from_diffusers_config(dict(tiny_transformer(single=3).config))
    with pytest.raises(InvalidOption, match=r"mean inputs are of another model.*single_blocks.2"):
        check_means(arch, full_means(deeper))


@pytest.mark.parametrize("layer", ["double_blocks.0.img_mod.lin", "single_blocks.0.linear2"])
def test_a_recipe_with_means_of_other_layers_is_refused(arch: FluxArchitecture, layer: str) -> None:
    planned = plan_recipe(arch, Fp8Config(exclude=("*.linear2",)), input_mean=full_means(arch))
    more = {**planned.input_mean, layer: full_means(arch)[layer]}
    with pytest.raises(InvalidOption, match=rf"mean input of {layer}.*not in FP8"):
        check_recipe(Fp8Recipe(planned.config, planned.linears, {}, more), arch)


@pytest.mark.parametrize("damage", ["missing", "nan", "short"])
def test_a_recipe_with_damaged_means_is_refused(arch: FluxArchitecture, damage: str) -> None:
    planned, means = plan_recipe(arch, Fp8Config()), full_means(arch)
    means = {name: mean for name, mean in means.items() if not is_modulation(name)}
    check_recipe(Fp8Recipe(planned.config, planned.linears, {}, means), arch)
    if damage == "missing":
        del means["single_blocks.0.linear1"]
    else:
        means["single_blocks.0.linear1"] = torch.full((64 if damage == "nan" else 3,), math.nan)
    with pytest.raises(InvalidOption, match=r"single_blocks.0.linear1"):
        check_recipe(Fp8Recipe(planned.config, planned.linears, {}, means), arch)


def test_static_needs_every_range(arch: FluxArchitecture) -> None:
    amax = full_amax(arch)
    del amax["single_blocks.1.linear1"]
    with pytest.raises(InvalidOption, match=r"1 of 20 have none; the first is single_blocks.1.linear1"):
        plan_recipe(arch, STATIC, amax)
    with pytest.raises(InvalidOption, match="20 of 20 have none"):
        plan_recipe(arch, STATIC)


def test_dynamic_refuses_ranges(arch: FluxArchitecture) -> None:
    with pytest.raises(InvalidOption, match="activations are dynamic"):
        plan_recipe(arch, Fp8Config(), full_amax(arch))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_range_without_a_scale_is_named(arch: FluxArchitecture, bad: float) -> None:
    amax = {**full_amax(arch), "double_blocks.1.img_mlp.2": bad}
    with pytest.raises(InvalidOption, match=r"double_blocks.1.img_mlp.2"):
        plan_recipe(arch, STATIC, amax)


def test_ranges_of_another_model_are_refused(arch: FluxArchitecture) -> None:
    deeper = FluxArchitecture.from_diffusers_config(dict(tiny_transformer(single=3).config))
    with pytest.raises(InvalidOption, match=r"another model.*single_blocks.2.linear1"):
        check_amax(arch, full_amax(deeper))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"granularity": "row"}, "Granularity.ROW"),
        ({"activations": "static"}, "Activations.STATIC"),
        ({"exclude": "*.linear2"}, "no tuple"),
        ({"exclude": (1,)}, "no tuple"),
        ({"headroom": 0.9}, "headroom"),
        ({"headroom": math.nan}, "headroom"),
        ({"headroom": 1000.0}, "headroom"),
    ],
)
def test_bad_options_are_refused(options: dict, text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        Fp8Config(**options)


def test_a_recipe_is_hashable_and_survives_a_copy(arch: FluxArchitecture) -> None:
    recipe = plan_recipe(arch, STATIC, full_amax(arch))
    again = copy.deepcopy(recipe)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert recipe != Fp8Recipe(recipe.config, recipe.linears, {**recipe.input_amax, "single_blocks.0.linear1": 9e9})
    assert recipe.config.granularity is Granularity.ROW


def test_a_recipe_with_means_is_hashable_and_survives_a_copy(arch: FluxArchitecture) -> None:
    recipe = plan_recipe(arch, STATIC, full_amax(arch), full_means(arch))
    again = copy.deepcopy(recipe)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert same_recipe(again, recipe)


def test_other_means_make_another_recipe(arch: FluxArchitecture) -> None:
    """What `==` of recipes cannot see: bound biases would be those of the means from before."""
    plain = plan_recipe(arch, Fp8Config())
    first, second = (plan_recipe(arch, Fp8Config(), input_mean=full_means(arch, seed)) for seed in (0, 1))
    assert not same_recipe(plain, first)
    assert not same_recipe(first, plain)
    assert not same_recipe(first, second)
    assert not same_recipe(first, None)
    assert not same_recipe(None, first)
    assert same_recipe(None, None)
    other = plan_recipe(arch, Fp8Config(Granularity.TENSOR), input_mean=full_means(arch))
    assert not same_recipe(first, other)
