"""The compiled transformer is still diffusers' object: its attributes, methods, files, copies, and the way back."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from tests.unit.diffusers_pair import LORA_BOUND, Pair, lora
from tests.unit.tiny_flux import FP32_BOUND, call_inputs, run_diffusers, tiny_transformer
from trt_core import compile_transformer, restore_transformer
from trt_core.backends.check import relative_l2
from trt_core.errors import BuildCancelled, InvalidOption, MissingDependency, UnsupportedModel
from trt_core.host import Silent


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def same_state(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return list(mine) == list(other) and all(torch.equal(mine[name], other[name]) for name in other)


def test_it_is_still_a_flux_transformer(pair: Pair) -> None:
    pair.outputs()
    ours, theirs = pair.ours, pair.theirs
    assert isinstance(ours, FluxTransformer2DModel)
    assert type(ours).__name__ == "FluxTransformer2DModel"
    assert ours.config == theirs.config
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert ours.num_parameters() == theirs.num_parameters()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert repr(ours) == repr(theirs)
    assert not ours.training
    with ours.cache_context("cond"):
        assert pair.error() <= FP32_BOUND


def test_parameters_share_memory_with_what_the_segments_read(pair: Pair) -> None:
    """No second copy of the weights: fused ones hold q, k and v, others are the parameters themselves."""
    pair.outputs()
    state = pair.ours._trt_state
    attn = pair.ours.transformer_blocks[0].attn
    fused = state.module.weights.tensors["double_blocks.0.img_attn.qkv.weight"]
    assert fused.data_ptr() == attn.to_q.weight.data_ptr()
    assert attn.to_k.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.module.weights.tensors.values()}
    assert sum(held.values()) == sum(p.numel() * p.element_size() for p in pair.theirs.parameters())


def test_the_state_is_the_base_while_a_lora_is_applied(pair: Pair) -> None:
    base = {name: value.clone() for name, value in pair.ours.state_dict().items()}
    pair.add("a", lora())
    pair.outputs()
    assert pair.layers > 0
    assert same_state(pair.ours, pair.theirs)
    state = pair.ours.state_dict()
    assert all(torch.equal(state[n.replace("to_q.", "to_q.base_layer.")], v) for n, v in base.items() if "to_q" in n)
    parameters = dict(pair.theirs.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in pair.ours.named_parameters())
    assert pair.error() <= LORA_BOUND, "reading the state has taken the LoRA away"


def test_save_and_load(pair: Pair, tmp_path: Path) -> None:
    pair.add("a", lora())
    pair.outputs()
    pair.both(lambda model: model.unload_lora())
    pair.outputs()
    pair.ours.save_pretrained(tmp_path / "saved")
    read = FluxTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert type(read) is FluxTransformer2DModel
    assert same_state(read, pair.theirs)
    assert relative_l2(run_diffusers(read, call_inputs(read)), pair.outputs()[0]) <= FP32_BOUND


def test_saving_an_adapter_is_diffusers_own(pair: Pair, tmp_path: Path) -> None:
    pair.add("a", lora())
    pair.outputs()
    saved = []
    for name, model in (("ours", pair.ours), ("theirs", pair.theirs)):
        model.save_lora_adapter(tmp_path / name, adapter_name="a")
        saved.append(load_file(next((tmp_path / name).glob("*.safetensors"))))
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
    assert pair.error() <= LORA_BOUND


@pytest.mark.parametrize("when", ["before the first call", "after it", "under a LoRA"])
def test_another_dtype(pair: Pair, when: str) -> None:
    if when != "before the first call":
        pair.outputs()
    if when == "under a LoRA":
        pair.add("a", lora())
        pair.outputs()
    pair.both(lambda model: model.to(torch.bfloat16))
    seen, expected = pair.outputs()
    assert seen.dtype is torch.bfloat16
    assert relative_l2(seen, expected) < 0.02
    assert pair.report.builds == (1 if when == "before the first call" else 2)
    assert same_state(pair.ours, pair.theirs)


def test_moving_to_where_it_is_compiles_nothing(pair: Pair) -> None:
    pair.outputs()
    pair.ours.to("cpu").eval()
    assert pair.error() <= FP32_BOUND
    assert pair.report.builds == 1


def test_a_model_that_moves_leaves_no_memory_behind(pair: Pair) -> None:
    """enable_model_cpu_offload moves the transformer away to make room; fused copies must not stay."""
    pair.outputs()
    bound = [weakref.ref(tensor) for tensor in pair.ours._trt_state.module.weights.tensors.values()]
    pair.ours.to(torch.bfloat16)
    gc.collect()
    assert not [ref for ref in bound if ref() is not None]


# -- the way back and copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first call", "after it", "under a LoRA"])
def test_restore_gives_the_very_same_model_back(pair: Pair, when: str) -> None:
    if when != "before the first call":
        pair.outputs()
    if when == "under a LoRA":
        pair.add("a", lora())
        pair.outputs()
    assert restore_transformer(pair.ours) is pair.ours
    assert type(pair.ours) is FluxTransformer2DModel
    assert "forward" not in vars(pair.ours)
    assert not [name for name in vars(pair.ours) if "trt" in name]
    assert same_state(pair.ours, pair.theirs)
    seen, expected = pair.outputs()
    assert torch.equal(seen, expected)
    assert restore_transformer(pair.ours) is pair.ours, "once more does nothing"


def test_compiling_twice_is_compiling_anew(pair: Pair, tmp_path: Path) -> None:
    pair.add("a", lora())
    pair.outputs()
    assert compile_transformer(pair.ours, **pair.options) is pair.ours
    assert type(pair.ours).__mro__[1] is FluxTransformer2DModel, "classes do not pile up"
    assert pair.error() <= LORA_BOUND
    assert pair.report.builds == 1


def test_a_deep_copy_is_compiled_by_itself(pair: Pair) -> None:
    pair.add("a", lora())
    before, expected = pair.outputs()
    copied = copy.deepcopy(pair.ours)
    assert torch.equal(run_diffusers(copied, call_inputs(copied)), before)
    with torch.no_grad():
        copied.proj_out.weight.zero_()
    restore_transformer(copied)
    assert torch.equal(pair.outputs()[0], before), "the copy shares weights with the original"
    pair.both(lambda model: model.unload_lora())
    assert pair.error() <= LORA_BOUND
    assert relative_l2(expected, before) <= LORA_BOUND


def test_pickling_does_not_write_engines(pair: Pair) -> None:
    """torch.save of a whole module is not supported; it must fail or give a plain copy, never half a model."""
    pair.outputs()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(pair.ours)
    assert pair.error() <= FP32_BOUND


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "onnx"}, r"backend='onnx' does not exist\. Use one of 'auto', 'tensorrt', 'inductor', 'eager'"),
        ({"attention": "sage"}, r"attention='sage' does not exist\. Use one of 'auto', 'cudnn'"),
        ({"base_weights": "disk"}, r"base_weights='disk' does not exist\. Use one of 'auto', 'gpu', 'host'"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(options: dict[str, Any], said: str) -> None:
    model = tiny_transformer()
    with pytest.raises(InvalidOption, match=said):
        compile_transformer(model, **options)
    assert type(model) is FluxTransformer2DModel


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()])
def test_another_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match=r'is not a FLUX\.1 transformer.*backend="mttm"'):
        compile_transformer(model)


@pytest.mark.parametrize("thing", [None, "flux", {}, 7])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"has no transformer\. Pass a diffusers pipeline"):
        compile_transformer(thing)


def test_tensorrt_without_a_gpu_is_refused_at_the_first_call(tmp_path: Path) -> None:
    pair = Pair(tmp_path, backend="tensorrt")
    with pytest.raises(MissingDependency, match='backend="tensorrt" cannot be used here'):
        pair.outputs()
    compile_transformer(pair.ours, **{**pair.options, "backend": "eager"})
    assert pair.error() <= FP32_BOUND


def test_weights_without_data_are_refused(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with torch.device("meta"):
        pair.ours.proj_out = nn.Linear(64, 64)
    with pytest.raises(UnsupportedModel, match=r"has no data here.*enable_model_cpu_offload\(\)"):
        pair.outputs()


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.ours.proj_out.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match=r"dtypes torch\.bfloat16, torch\.float32.*torch_dtype"):
        pair.outputs()


# -- cancel ----------------------------------------------------------------------------------------------------------


class CancelOnce(Silent):
    """Progress whose user cancels, or presses Ctrl-C, the first time it shows something."""

    def __init__(self, interrupt: bool) -> None:
        self.interrupt, self.left = interrupt, 1

    def update(self, stage: str, done: int, total: int) -> None:
        if self.interrupt and self.left:
            self.left -= 1
            raise KeyboardInterrupt

    def cancelled(self) -> bool:
        if self.interrupt or not self.left:
            return False
        self.left -= 1
        return True


@pytest.mark.parametrize("interrupt", [False, True], ids=["cancel", "Ctrl-C"])
@pytest.mark.parametrize("under_lora", [False, True])
def test_a_cancelled_first_call_leaves_everything_usable(interrupt: bool, under_lora: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, progress=CancelOnce(interrupt))
    if under_lora:
        pair.add("a", lora())
    with pytest.raises(KeyboardInterrupt if interrupt else BuildCancelled):
        run_diffusers(pair.ours, call_inputs(pair.ours))
    assert pair.report.builds == 0
    assert same_state(pair.ours, pair.theirs)
    assert pair.error() <= LORA_BOUND
    assert pair.report.builds == 1


def test_the_log_says_each_reason_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.both(lambda model: model.transformer_blocks[0].register_forward_hook(lambda *_: None))
    with caplog.at_level(logging.INFO, "trt_core.diffusers"):
        for _ in range(3):
            pair.outputs()
    said = [r.getMessage() for r in caplog.records if "runs eagerly" in r.getMessage()]
    assert said == ["double_blocks.0 runs eagerly: it has forward hooks"]
