"""What somebody else changed runs as they want, in diffusers' own block, with the reason; the rest stays compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import nn

from tests.unit.diffusers_pair import LORA_BOUND, Pair, lora
from tests.unit.tiny_flux import FP32_BOUND, call_inputs, run_diffusers, tiny_transformer
from trt_core import compile_transformer, restore_transformer
from trt_core.backends.check import relative_l2
from trt_core.errors import InvalidOption, UnsupportedModel

EFFECT = 0.003


class Louder(FluxAttnProcessor):
    """Somebody's attention processor: attention's output is larger."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        return tuple(1.5 * part for part in out) if isinstance(out, tuple) else 1.5 * out


def _scaled(module: nn.Module, args: Any, output: Any) -> Any:
    return tuple(part * 0.5 for part in output) if isinstance(output, tuple) else output * 0.5


def _own_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: _scaled(module, args, original(*args, **kwargs))


class Half(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return _scaled(module, (), output)


CHANGES: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "forward hook": (
        lambda m: m.transformer_blocks[0].register_forward_hook(_scaled), "double_blocks.0", "it has forward hooks",
    ),
    "pre-hook": (
        lambda m: m.single_transformer_blocks[1].register_forward_pre_hook(
            lambda block, args, kwargs: (args, {**kwargs, "temb": kwargs["temb"] * 0.5}), with_kwargs=True
        ), "single_blocks.1", "it has forward hooks",
    ),
    "own forward": (
        lambda m: _own_forward(m.transformer_blocks[1]), "double_blocks.1", "its forward was replaced",
    ),
    "accelerate hook": (
        lambda m: add_hook_to_module(m.single_transformer_blocks[0], Half()), "single_blocks.0",
        "its forward was replaced",
    ),
    "attention processor": (
        lambda m: m.transformer_blocks[0].attn.set_processor(Louder()), "double_blocks.0",
        "its attention processor is Louder",
    ),
    "single attention processor": (
        lambda m: m.single_transformer_blocks[0].attn.set_processor(Louder()), "single_blocks.0",
        "its attention processor is Louder",
    ),
    "hook on a layer inside": (
        lambda m: m.transformer_blocks[1].attn.to_v.register_forward_hook(_scaled), "double_blocks.1",
        "its attn.to_v has hooks or another forward",
    ),
    "own forward of a layer inside": (
        lambda m: _own_forward(m.transformer_blocks[0].ff.net[2]), "double_blocks.0",
        "its ff.net.2 has hooks or another forward",
    ),
    "pre-hook on a layer inside": (
        lambda m: m.transformer_blocks[0].ff.register_forward_pre_hook(lambda layer, args: (args[0].roll(1, -1),)),
        "double_blocks.0", "its ff has hooks or another forward",
    ),
    "hook on attention": (
        lambda m: m.single_transformer_blocks[1].attn.register_forward_hook(_scaled), "single_blocks.1",
        "its attn has hooks or another forward",
    ),
    "hook before the blocks": (
        lambda m: m.x_embedder.register_forward_hook(_scaled), "the whole model", "x_embedder has hooks",
    ),
    "hook deep outside the blocks": (
        lambda m: m.time_text_embed.text_embedder.linear_1.register_forward_hook(_scaled), "the whole model",
        "time_text_embed.text_embedder.linear_1 has hooks",
    ),
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.mark.parametrize("under_lora", [False, True], ids=["", "under a LoRA"])
@pytest.mark.parametrize(("change", "where", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_changed_block_runs_as_it_was_changed(
    change: Callable[[Any], object], where: str, reason: str, under_lora: bool, pair: Pair
) -> None:
    if under_lora:
        pair.add("a", lora("to_q", "to_v", "proj_mlp", "ff.net.2"))
    before, _ = pair.outputs()
    pair.both(change)
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert relative_l2(seen, before) > EFFECT, "the change does nothing, so the test proves nothing"
    assert list(pair.report.eager_blocks) == [where]
    assert reason in pair.report.eager_blocks[where]
    assert pair.report.builds == 1


def test_hooks_that_are_removed_compile_again(pair: Pair) -> None:
    before, _ = pair.outputs()
    handles: list[Any] = []
    pair.both(lambda model: handles.append(model.transformer_blocks[0].register_forward_hook(_scaled)))
    pair.both(lambda model: add_hook_to_module(model.single_transformer_blocks[0], Half()))
    pair.both(lambda model: model.transformer_blocks[1].attn.set_processor(Louder()))
    assert pair.error() <= FP32_BOUND
    assert sorted(pair.report.eager_blocks) == ["double_blocks.0", "double_blocks.1", "single_blocks.0"]
    for handle in handles:
        handle.remove()
    pair.both(lambda model: remove_hook_from_module(model.single_transformer_blocks[0]))
    pair.both(lambda model: model.transformer_blocks[1].attn.set_processor(FluxAttnProcessor()))
    assert torch.equal(pair.outputs()[0], before)
    assert pair.report.eager_blocks == {}


def test_eager_blocks_take_their_lora_from_peft_and_others_from_us(pair: Pair) -> None:
    pair.add("a", lora("to_q", "to_k"))
    pair.outputs()
    assert pair.layers == 4
    pair.both(lambda model: model.transformer_blocks[0].register_forward_hook(_scaled))
    assert pair.error() <= LORA_BOUND
    assert pair.report.last_refit.restored == 1, "the hooked block's fused qkv is its base again"


def test_residuals_and_batches_pass_eager_blocks(pair: Pair) -> None:
    pair.both(lambda model: model.transformer_blocks[0].register_forward_hook(_scaled))
    pair.both(lambda model: model.single_transformer_blocks[1].register_forward_hook(_scaled))
    residual = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    arguments = {"controlnet_block_samples": [residual], "controlnet_single_block_samples": [residual]}
    assert pair.error({"batch": 2}, **arguments) <= FP32_BOUND


def test_an_ip_adapter_runs_the_whole_model_as_diffusers_runs_it(pair: Pair) -> None:
    def add(model: Any) -> None:
        for block in model.transformer_blocks:
            processor = FluxIPAdapterAttnProcessor(hidden_size=64, cross_attention_dim=48, num_tokens=(4,), scale=0.7)
            for parameter in processor.parameters():
                nn.init.normal_(parameter, std=0.2)
            block.attn.set_processor(processor)

    plain, _ = pair.outputs()
    pair.both(add)
    image = [torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(8))]
    seen, expected = pair.outputs(joint_attention_kwargs={"ip_hidden_states": image})
    assert relative_l2(seen, expected) <= FP32_BOUND
    assert relative_l2(seen, plain) > EFFECT
    assert list(pair.report.eager_blocks) == ["the whole model"]
    pair.both(lambda model: model.set_attn_processor(FluxAttnProcessor()))
    assert torch.equal(pair.outputs()[0], plain)
    assert pair.report.eager_blocks == {}


def test_fused_projections_run_eagerly(pair: Pair) -> None:
    pair.outputs()
    pair.both(lambda model: model.fuse_qkv_projections())
    assert pair.error() <= FP32_BOUND
    assert len(pair.report.eager_blocks) == 4
    pair.both(lambda model: model.unfuse_qkv_projections())
    assert pair.error() <= FP32_BOUND


def test_training_runs_diffusers_own_model_with_gradients(pair: Pair) -> None:
    pair.outputs()
    inputs = call_inputs(pair.ours)
    gradients = []
    for model in (pair.ours, pair.theirs):
        model.train()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        gradients.append(model.transformer_blocks[0].attn.to_q.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4)
    assert "being trained" in pair.report.eager_blocks["the whole model"]
    pair.both(lambda model: model.eval())
    assert pair.error() <= FP32_BOUND
    assert pair.report.eager_blocks == {}


def test_first_block_cache_keeps_working(pair: Pair) -> None:
    pair.both(lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.0)))
    with pair.ours.cache_context("c"), pair.theirs.cache_context("c"):
        assert pair.error() <= FP32_BOUND
    assert len(pair.report.eager_blocks) == 4
    pair.both(lambda model: model.disable_cache())
    assert pair.error() <= FP32_BOUND
    assert pair.report.eager_blocks == {}, "hooks are gone"


# -- offload hooks on the whole model --------------------------------------------------------------------------------


class Offload(CpuOffload):
    """accelerate's offload between two places of a machine that has one, counted."""

    def __init__(self) -> None:
        super().__init__(execution_device="cpu")
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        module.to("cpu")
        return super().pre_forward(module, *args, **kwargs)


@pytest.mark.parametrize("first", ["hook", "compile"])
def test_offload_of_the_whole_model_keeps_it_compiled(first: str, tmp_path: Path) -> None:
    pair, hook = Pair(tmp_path), Offload()
    if first == "hook":
        restore_transformer(pair.ours)
        add_hook_to_module(pair.ours, hook)
        compile_transformer(pair.ours, **pair.options)
    else:
        add_hook_to_module(pair.ours, hook)
    pair.add("a", lora())
    for _ in range(3):
        assert pair.error() <= LORA_BOUND
    assert hook.calls == 3
    assert pair.report.builds == 1, "it ran as diffusers runs it, or compiled at every call"
    remove_hook_from_module(pair.ours)
    assert pair.error() <= LORA_BOUND
    assert pair.report.builds == 1
    restore_transformer(pair.ours)
    assert pair.error() == 0


def test_restore_under_an_offload_hook(tmp_path: Path) -> None:
    pair, hook = Pair(tmp_path), Offload()
    add_hook_to_module(pair.ours, hook)
    pair.outputs()
    restore_transformer(pair.ours)
    assert pair.error() == 0
    assert hook.calls == 2


def test_a_forward_that_somebody_replaced_before_is_refused(tmp_path: Path) -> None:
    model = tiny_transformer()
    _own_forward(model)
    with pytest.raises(InvalidOption, match=r"forward was already replaced.*Call compile_transformer\(\) first"):
        compile_transformer(model)
    assert not hasattr(model, "_trt_state")


def test_layer_by_layer_offload_says_what_to_use(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    pair = Pair(tmp_path)
    cpu_offload(pair.ours, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"layer by layer.*Use enable_model_cpu_offload\(\)"):
        run_diffusers(pair.ours, call_inputs(pair.theirs))
