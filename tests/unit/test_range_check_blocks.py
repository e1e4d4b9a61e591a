"""The static FP8 ranges of a host that runs blocks one by one, as ComfyUI does: when a step is over, and masks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import base_weights, low_rank, one
from tests.unit.fp8_bound import ARCH, CPU
from tests.unit.fp8_simulation import largest_inputs
from tests.unit.tiny_flux import call_inputs, tiny_transformer
from trt_core.config import Backend, CompileConfig
from trt_core.execution import Pe
from trt_core.flux.linear import Fp8Weight, noting_inputs
from trt_core.fp8_recipe import Activations, Fp8Config, block_linears, plan_recipe
from trt_core.mutable_module import MutableTRTModule

HARMLESS = 464 / 448
"""Up to here E4M3 rounds to its largest number."""
MLP = "double_blocks.0.img_mlp.0.weight"


@pytest.fixture(scope="module")
def amax() -> dict[str, float]:
    model = tiny_transformer()
    return largest_inputs(model, [call_inputs(model)])


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trt_core.fp8")


@pytest.fixture
def module(amax: dict[str, float], tmp_path: Path) -> MutableTRTModule:
    """Without stem and final layer, and with a LoRA that drives `double_blocks.0.img_mlp.2`."""
    recipe = plan_recipe(ARCH, Fp8Config(activations=Activations.STATIC), amax)
    module = MutableTRTModule(ARCH, CompileConfig(Backend.EAGER, cache_folder=str(tmp_path)))
    weights = {n: t for n, t in base_weights(torch.float32).items() if n.startswith(("double_", "single_"))}
    module.load_blocks(weights.items(), CPU, recipe)
    shape = tuple(weights[MLP].shape)
    module.refit(one(MLP, low_rank(shape, 4, torch.Generator().manual_seed(3), size=20.0)))
    return module


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def steps(
    module: MutableTRTModule, doubles: int = 2, singles: int = 2, mask: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """One step, block by block; the same numbers each time."""
    random = torch.Generator().manual_seed(8)
    img, txt = (torch.randn(1, tokens, 64, generator=random) for tokens in (40, 7))
    vec, angles = torch.randn(1, 64, generator=random), torch.randn(47, 16, generator=random)
    pe = Pe(angles.cos(), angles.sin(), 7)
    runner = module.runner(1, 40, 7, mask is not None)
    for index in range(doubles):
        img, txt = runner.double(index, img, txt, vec, pe, mask)
        yield f"double_blocks.{index}", torch.cat((txt, img), 1)
    x = torch.cat((txt, img), 1)
    for index in range(singles):
        x = runner.single(index, x, vec, pe, mask)
        yield f"single_blocks.{index}", x


def noted(module: MutableTRTModule, **options: Any) -> dict[str, float]:
    """What the blocks themselves, which are eager here, are given in a step that is not looked at."""
    layers = {id(t): n.removesuffix(".input_scale") for n, t in module.weights.tensors.items() if "input_scale" in n}
    found: dict[str, float] = {}

    def note(x: Tensor, weight: Fp8Weight) -> None:
        found[layers[id(weight.input_scale)]] = float(x.abs().max() / (weight.input_scale * 448))

    with noting_inputs(note):
        list(steps(module, **options))
    return {name: value for name, value in found.items() if value > HARMLESS}


def test_the_last_block_ends_the_check(module: MutableTRTModule, caplog: Any) -> None:
    for name, _ in steps(module):
        assert bool(warnings(caplog)) is (name == "single_blocks.1")
    found = module.report().out_of_range
    assert found["double_blocks.0.img_mlp.2"] > 4
    assert found == pytest.approx(noted(module), rel=1e-6)


def test_every_layer_but_modulations_is_looked_at(module: MutableTRTModule, caplog: Any) -> None:
    small = dict.fromkeys(block_linears(ARCH), 1e-3)
    recipe = plan_recipe(ARCH, Fp8Config(activations=Activations.STATIC, headroom=1.0), small)
    weights = {n: t for n, t in base_weights(torch.float32).items() if n.startswith(("double_", "single_"))}
    module.load_blocks(weights.items(), CPU, recipe)
    list(steps(module))
    found = module.report().out_of_range
    assert set(found) == recipe.activation_linears
    assert found == pytest.approx(noted(module), rel=1e-6), "negative inputs count as positive ones do"


def test_bits_and_masks(module: MutableTRTModule) -> None:
    """A mask changes what attention gives to the next layer, in the check too."""
    mask = torch.ones(1, 1, 47, 47, dtype=torch.bool)
    mask[..., :7] = False
    first = [x for _, x in steps(module, mask=mask)]
    found = module.report().out_of_range
    assert all(torch.equal(x, y) for x, (_, y) in zip(first, steps(module, mask=mask), strict=True))
    assert found == pytest.approx(noted(module, mask=mask), rel=1e-6)
    assert found != pytest.approx(noted(module), rel=1e-6)


def test_a_last_block_that_somebody_else_runs(module: MutableTRTModule, caplog: Any) -> None:
    list(steps(module, singles=1))
    assert warnings(caplog) == []
    list(steps(module, singles=1))
    assert len(warnings(caplog)) == 1
    list(steps(module, singles=1))
    assert len(warnings(caplog)) == 1


def test_the_report_ends_it_too(module: MutableTRTModule, caplog: Any) -> None:
    list(steps(module, singles=0))
    assert "double_blocks.0.img_mlp.2" in module.report().out_of_range
    assert len(warnings(caplog)) == 1


def test_a_refit_in_the_middle_of_a_step_forgets_what_was_seen(module: MutableTRTModule, caplog: Any) -> None:
    list(steps(module, singles=0))
    module.refit({})
    fresh = module.report().out_of_range
    assert fresh == {}
    list(steps(module))
    assert "double_blocks.0.img_mlp.2" not in module.report().out_of_range


def test_unloading_forgets_it(module: MutableTRTModule) -> None:
    list(steps(module))
    module.unload()
    assert module.report().out_of_range == {}
