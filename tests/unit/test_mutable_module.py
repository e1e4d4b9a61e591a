"""MutableTRTModule: its states, its extras, when it compiles, and that it gives everything back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.bound_weights import low_rank, one
from tests.unit.tiny_flux import (
    FP32_BOUND,
    bfl_weights,
    call_inputs,
    loaded,
    run,
    run_diffusers,
    shapes_of,
    tiny_transformer,
)
from trt_core.backends.check import relative_l2
from trt_core.config import Backend, CompileConfig, Profile, ShapeRange
from trt_core.errors import BuildCancelled, LoraMismatch, ShapeOutsideProfile, TRTError
from trt_core.execution import Pe
from trt_core.extras import Extras
from trt_core.flux.architecture import FluxArchitecture
from trt_core.host import Silent
from trt_core.mutable_module import ModuleState, MutableTRTModule

MODEL = tiny_transformer()
PROFILE = Profile(ShapeRange(8, 40, 64), ShapeRange(1, 7, 16), ShapeRange(1, 1, 2))
QKV = "double_blocks.1.img_attn.qkv.weight"
TEXT = 7


@pytest.fixture
def module(tmp_path: Path) -> MutableTRTModule:
    return loaded(bfl_weights(MODEL), tmp_path)


def test_states(tmp_path: Path) -> None:
    weights = bfl_weights(MODEL)
    module = MutableTRTModule(
        FluxArchitecture.from_shapes(shapes_of(weights)), CompileConfig(Backend.EAGER, cache_folder=str(tmp_path))
    )
    assert module.state is ModuleState.EMPTY
    with pytest.raises(TRTError, match=r"No weights are bound. Call load\(\) first."):
        run(module, call_inputs(MODEL))
    module.load(weights)
    assert module.state is ModuleState.LOADED
    run(module, call_inputs(MODEL))
    assert module.state is ModuleState.READY
    module.close()
    module.close()
    assert module.state is ModuleState.CLOSED
    for use in (lambda: run(module, call_inputs(MODEL)), lambda: module.load(weights)):
        with pytest.raises(TRTError, match=r"was closed\. Compile the transformer again"):
            use()


def test_loading_copies_nothing_and_keeps_what_is_compiled(module: MutableTRTModule) -> None:
    run(module, call_inputs(MODEL))
    other = tiny_transformer(seed=5)
    weights = bfl_weights(other)
    module.load(weights)
    assert {n: t.data_ptr() for n, t in module.weights.tensors.items()} == {n: t.data_ptr() for n, t in weights.items()}
    inputs = call_inputs(other)
    assert relative_l2(run(module, inputs), run_diffusers(other, inputs)) <= FP32_BOUND
    assert module.builds == 1


def test_another_dtype_compiles_anew(module: MutableTRTModule) -> None:
    run(module, call_inputs(MODEL))
    module.load({name: tensor.bfloat16() for name, tensor in bfl_weights(MODEL).items()})
    assert run(module, call_inputs(MODEL)).dtype is torch.bfloat16
    assert module.builds == 2


def test_sizes_batches_and_text_lengths_do_not_rebuild_eager(module: MutableTRTModule) -> None:
    for sizes in ({}, {"height": 30, "width": 40}, {"batch": 5}, {"text": 1}):
        run(module, call_inputs(MODEL, **sizes))
    assert module.builds == 1


def test_output_needs_no_gradient(module: MutableTRTModule) -> None:
    assert not run(module, call_inputs(MODEL)).requires_grad


# -- refit -----------------------------------------------------------------------------------------------------------


def test_refit_is_what_the_merged_model_computes(module: MutableTRTModule) -> None:
    inputs = call_inputs(MODEL)
    before = run(module, inputs)
    change = low_rank((192, 64), 8, torch.Generator().manual_seed(1), size=0.1)
    report = module.refit(one(QKV, change, strength=-0.7))
    merged = bfl_weights(MODEL)
    merged[QKV] += -0.7 * change.scale * change.delta("cpu")
    expected = run(loaded(merged, Path(module.config.cache_folder or "")), inputs)
    assert report is not None
    assert report.layers == 1
    assert relative_l2(run(module, inputs), expected) <= FP32_BOUND
    assert relative_l2(before, expected) > 0.001
    assert module.refit(one(QKV, change, strength=-0.7)) is None, "it is applied already"
    module.refit({})
    assert torch.equal(run(module, inputs), before)
    assert module.builds == 1


def test_a_lora_may_come_before_the_first_call(module: MutableTRTModule) -> None:
    module.refit(one(QKV, low_rank((192, 64), 4, torch.Generator().manual_seed(1))))
    seen = run(module, call_inputs(MODEL))
    module.refit({})
    assert relative_l2(run(module, call_inputs(MODEL)), seen) > 0.001


def test_a_foreign_weight_is_refused(module: MutableTRTModule) -> None:
    with pytest.raises(LoraMismatch, match="which this model does not have"):
        module.refit(one("double_blocks.9.img_attn.qkv.weight", low_rank((192, 64), 4, torch.Generator())))
    assert module.last_refit is None


def test_close_restores_the_base_and_lets_go(tmp_path: Path) -> None:
    weights = bfl_weights(MODEL)
    module = loaded(weights, tmp_path)
    module.refit(one(QKV, low_rank((192, 64), 4, torch.Generator().manual_seed(1))))
    run(module, call_inputs(MODEL))
    assert not torch.equal(weights[QKV], bfl_weights(MODEL)[QKV])
    module.close()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bfl_weights(MODEL).items())
    alive = [weakref.ref(tensor) for tensor in weights.values()]
    weights.clear()
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


# -- extras ----------------------------------------------------------------------------------------------------------


def test_a_mask_hides_tokens(module: MutableTRTModule) -> None:
    inputs = call_inputs(MODEL)
    plain = run(module, inputs)
    hidden = torch.ones(TEXT + 40, dtype=torch.bool)
    hidden[TEXT - 1] = False
    masked = run(module, inputs, Extras(mask=hidden[None, None, None, :]))
    shorter = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :-1], "txt_ids": torch.zeros(6, 3)}
    assert relative_l2(masked, run(module, shorter)) <= FP32_BOUND
    assert relative_l2(masked, plain) > 0.001
    everything = run(module, inputs, Extras(mask=torch.ones_like(hidden)[None, None, None, :]))
    assert relative_l2(everything, plain) <= FP32_BOUND
    assert module.builds == 1, "split eager blocks take masks as they are"


def test_residuals_of_none_add_nothing(module: MutableTRTModule) -> None:
    inputs = call_inputs(MODEL)
    plain = run(module, inputs)
    assert torch.equal(run(module, inputs, Extras([None, None], [None])), plain)
    zero = torch.zeros(1, 40, 64)
    assert torch.equal(run(module, inputs, Extras([zero], [None, zero])), plain)
    some = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(2))
    assert relative_l2(run(module, inputs, Extras([None, some])), plain) > 0.001
    assert relative_l2(run(module, inputs, Extras([], [None, some])), plain) > 0.001


def test_a_residual_reaches_the_image_after_its_block(module: MutableTRTModule) -> None:
    """Added after block 0 is the same as an override of block 0 that adds it."""
    inputs, residual = call_inputs(MODEL), torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(2))
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(img: Tensor, txt: Tensor, vec: Tensor, pe: Pe) -> tuple[Tensor, Tensor]:
        seen.append((img, txt))
        return img, txt

    run(module, inputs, Extras(double_overrides={1: spy}))
    run(module, inputs, Extras([residual], double_overrides={1: spy}))
    assert torch.allclose(seen[1][0] - seen[0][0], residual, atol=1e-5)
    assert torch.equal(seen[1][1], seen[0][1])


def test_overrides_replace_their_block_only(module: MutableTRTModule) -> None:
    inputs, calls = call_inputs(MODEL, batch=2), []

    def skip_double(img: Tensor, txt: Tensor, vec: Tensor, pe: Pe) -> tuple[Tensor, Tensor]:
        calls.append(("double", img.shape, txt.shape, vec.shape, pe.cos.shape, pe.txt_tokens))
        return img, txt

    def skip_single(x: Tensor, vec: Tensor, pe: Pe, txt_tokens: int) -> Tensor:
        calls.append(("single", x.shape, txt_tokens))
        return x

    seen = run(module, inputs, Extras(double_overrides={0: skip_double}, single_overrides={1: skip_single}))
    assert calls == [
        ("double", (2, 40, 64), (2, 7, 64), (2, 64), (47, 16), 7),
        ("single", (2, 47, 64), 7),
    ]
    shorter = bfl_weights(MODEL)
    for name in list(shorter):
        if name.startswith(("double_blocks.0.", "single_blocks.1.")):
            del shorter[name]
        elif name.startswith("double_blocks.1."):
            shorter[name.replace("double_blocks.1.", "double_blocks.0.")] = shorter.pop(name)
    assert relative_l2(seen, run(loaded(shorter, Path(module.config.cache_folder or "")), inputs)) <= FP32_BOUND


# -- the profile, failures and the report ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"height": 1, "width": 7}, "7 image tokens"),
        ({"height": 13, "width": 5}, "65 image tokens"),
        ({"text": 17}, "17 text tokens"),
        ({"batch": 3}, "batch 3"),
    ],
)
def test_a_shape_outside_a_fixed_profile_is_refused(sizes: dict[str, int], said: str, tmp_path: Path) -> None:
    module = loaded(bfl_weights(MODEL), tmp_path, profile=PROFILE, rebuild_outside_profile=False)
    with pytest.raises(ShapeOutsideProfile, match=f"{said}.*It takes 8 to 64 image tokens") as caught:
        run(module, call_inputs(MODEL, **sizes))
    assert caught.value.widget == "profile"
    assert run(module, call_inputs(MODEL)).shape == (1, 40, 64)


def test_a_shape_outside_the_profile_widens_it(tmp_path: Path) -> None:
    module = loaded(bfl_weights(MODEL), tmp_path, profile=PROFILE)
    run(module, call_inputs(MODEL, height=10, width=10, batch=3))
    plan = module.blocks_for(3, 100, TEXT).compiled.plan
    assert plan.profile.img_tokens == ShapeRange(8, 100, 100)
    assert plan.profile.holds(1, 8, 1)


class Cancels(Silent):
    def __init__(self) -> None:
        self.wanted = True

    def cancelled(self) -> bool:
        return self.wanted


def test_after_a_cancel_the_next_call_works(tmp_path: Path) -> None:
    progress = Cancels()
    weights = bfl_weights(MODEL)
    module = MutableTRTModule(
        FluxArchitecture.from_shapes(shapes_of(weights)),
        CompileConfig(Backend.EAGER, cache_folder=str(tmp_path)),
        progress,
    )
    module.load(weights)
    inputs = call_inputs(MODEL)
    with pytest.raises(BuildCancelled):
        run(module, inputs)
    assert (module.state, module.builds) == (ModuleState.LOADED, 0)
    progress.wanted = False
    assert relative_l2(run(module, inputs), run_diffusers(MODEL, inputs)) <= FP32_BOUND


def test_the_report_says_what_runs_where(module: MutableTRTModule) -> None:
    run(module, call_inputs(MODEL))
    report = module.report({"double_blocks.0": "somebody replaced it"})
    assert report.segments == {
        **dict.fromkeys(
            ("double_qkv", "double_out", "single_qkv_mlp", "single_out"), "eager (split eager + eager, auto attention)"
        ),
        "stem, modulation, final_layer": "eager (0.4 % of the work)",
    }
    assert report.eager_blocks == {"double_blocks.0": "somebody replaced it"}
    assert (report.builds, report.plan_bytes, report.last_refit) == (1, 0, None)
    assert report.build_seconds > 0


def test_two_modules_share_nothing(tmp_path: Path) -> None:
    first, second = loaded(bfl_weights(MODEL), tmp_path), loaded(bfl_weights(MODEL), tmp_path)
    inputs: dict[str, Any] = call_inputs(MODEL)
    before = run(second, inputs)
    first.refit(one(QKV, low_rank((192, 64), 4, torch.Generator().manual_seed(1))))
    assert relative_l2(run(first, inputs), before) > 0.001
    first.close()
    assert torch.equal(run(second, inputs), before)
