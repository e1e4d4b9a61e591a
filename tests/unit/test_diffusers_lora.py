"""diffusers' and PEFT's own LoRA calls on a compiled transformer, noticed by themselves at the next call."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.diffusers_pair import ATTENTION, EVERY_LINEAR, LORA_BOUND, Pair, lora
from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core.backends.check import relative_l2
from trt_core.diffusers_adapter import architecture_of
from trt_core.diffusers_binding import DiffusersBinding
from trt_core.peft_patches import PeftReader

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
EFFECT = 0.003
"""A LoRA under test changes the output by more than this, or the test would prove nothing."""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_adding_switching_stacking_and_removing(pair: Pair) -> None:
    base, _ = pair.outputs()
    pair.add("a", lora(*ATTENTION, "proj_mlp", "ff.net.2"))
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert relative_l2(seen, base) > EFFECT
    assert pair.layers == 6, "2 fused qkv, 2 fused linear1, 2 mlp"
    pair.add("b", lora("proj_out", rank=16))
    assert pair.error() <= LORA_BOUND, "a new adapter is the active one"
    assert pair.layers == 3, "the single blocks' proj_out and the model's own"
    pair.both(lambda model: model.set_adapters("a"))
    assert torch.equal(pair.outputs()[0], seen)
    assert (pair.layers, pair.report.last_refit.restored) == (9, 3), "what one or the other touches, and no more"
    pair.both(lambda model: model.set_adapters(["a", "b"], [0.5, -1.5]))
    assert pair.error() <= LORA_BOUND
    assert pair.layers == 9
    pair.both(lambda model: model.set_adapters(["a", "b"], [0.5, -1.0]))
    assert pair.error() <= LORA_BOUND
    assert pair.layers == 3, "only the layers whose strength changed"
    pair.both(lambda model: model.delete_adapters(["a"]))
    assert pair.error() <= LORA_BOUND
    pair.both(lambda model: model.unload_lora())
    seen, _ = pair.outputs()
    assert torch.equal(seen, base), "the base is back bit for bit"
    assert pair.report.builds == 1


def test_every_linear_layer_of_flux(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_transformer())
    pair.add("everything", lora(*EVERY_LINEAR))
    assert pair.error() <= LORA_BOUND
    assert pair.layers == 36, "10 in each double block, 3 in each single block, 10 around them"
    assert pair.report.eager_blocks == {}


def test_nothing_new_writes_nothing(pair: Pair) -> None:
    pair.add("a", lora())
    pair.outputs()
    first = pair.report.last_refit
    for _ in range(3):
        pair.outputs()
    assert pair.report.last_refit is first


@pytest.mark.parametrize("strength", [0.0, -1.0, 0.3, 7.0])
def test_strength(pair: Pair, strength: float) -> None:
    base, _ = pair.outputs()
    pair.add("a", lora())
    pair.both(lambda model: model.set_adapters("a", strength))
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert torch.equal(seen, base) is (strength == 0)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_any_rank(pair: Pair, rank: int) -> None:
    pair.add("a", lora(rank=rank))
    assert pair.error() <= LORA_BOUND


def test_overlapping_adapters_add_up(pair: Pair) -> None:
    pair.add("a", lora("to_q", "to_k"))
    pair.add("b", lora("to_k", "to_v", rank=8))
    pair.add("c", lora("to_k"))
    pair.both(lambda model: model.set_adapters(["a", "b", "c"], [1.0, 0.4, -0.6]))
    assert pair.error() <= LORA_BOUND


def test_a_to_b_is_a_fresh_b(tmp_path: Path) -> None:
    switched, fresh = (Pair(tmp_path, tiny_transformer(adversarial=True).bfloat16()) for _ in range(2))
    switched.add("a", lora(*ATTENTION, "proj_out"))
    switched.outputs()
    for pair in (switched, fresh):
        if pair is fresh:
            pair.add("a", lora(*ATTENTION, "proj_out"))
        pair.add("b", lora("to_q", "ff.net.2", rank=8))
    assert torch.equal(switched.outputs()[0], fresh.outputs()[0])
    switched.both(lambda model: model.disable_adapters())
    assert torch.equal(
        switched.outputs()[0], Pair(tmp_path, tiny_transformer(adversarial=True).bfloat16()).outputs()[0]
    )


def test_disable_and_enable(pair: Pair) -> None:
    base, _ = pair.outputs()
    pair.add("a", lora())
    with_lora, _ = pair.outputs()
    pair.both(lambda model: model.disable_adapters())
    assert torch.equal(pair.outputs()[0], base)
    pair.both(lambda model: model.enable_adapters())
    assert torch.equal(pair.outputs()[0], with_lora)


def test_the_scale_argument(pair: Pair) -> None:
    pair.add("a", lora())
    outputs = []
    for scale in (0.3, 1.0, -0.5, 0.0):
        seen, expected = pair.outputs(joint_attention_kwargs={"scale": scale})
        assert relative_l2(seen, expected) <= LORA_BOUND
        outputs.append(seen)
    assert all(relative_l2(one, other) > EFFECT for one, other in itertools.pairwise(outputs))
    assert pair.error() <= LORA_BOUND, "the scale was for those calls only"


def test_a_scale_that_stays_merges_once(pair: Pair) -> None:
    pair.add("a", lora())
    pair.outputs(joint_attention_kwargs={"scale": 0.3})
    first = pair.report.last_refit
    for _ in range(3):
        pair.outputs(joint_attention_kwargs={"scale": 0.3})
    assert pair.report.last_refit is first


def test_fuse_and_unfuse_are_diffusers_own(pair: Pair) -> None:
    pair.add("a", lora())
    pair.outputs()
    pair.both(lambda model: model.fuse_lora(lora_scale=0.7))
    assert pair.error() <= LORA_BOUND
    assert pair.report.last_refit.merged == 0, "a fused adapter is in the base; merging it too would apply it twice"
    pair.both(lambda model: model.unfuse_lora())
    assert pair.error() <= LORA_BOUND
    state = zip(pair.ours.state_dict().values(), pair.theirs.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in state)


def test_a_second_adapter_beside_a_fused_one(pair: Pair) -> None:
    pair.add("a", lora())
    pair.both(lambda model: model.fuse_lora())
    pair.add("b", lora("proj_mlp"))
    assert pair.error() <= LORA_BOUND


# -- what others do to weights while a LoRA is applied ---------------------------------------------------------------


def _layer(model: Any) -> Any:
    layer = model.transformer_blocks[1].attn.to_k
    return getattr(layer, "base_layer", layer)


@pytest.mark.parametrize(
    "adapter", [None, lora("to_k"), lora("to_q"), lora("proj_out")], ids=["none", "on it", "beside", "far"]
)
def test_a_change_in_place_is_noticed(pair: Pair, adapter: Any) -> None:
    if adapter is not None:
        pair.add("a", adapter)
    before, _ = pair.outputs()
    with torch.no_grad():
        pair.both(lambda model: _layer(model).weight.mul_(1.5).add_(0.02))
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert relative_l2(seen, before) > EFFECT / 10


@pytest.mark.parametrize(
    "adapter", [None, lora("to_k"), lora("to_q"), lora("proj_out")], ids=["none", "on it", "beside", "far"]
)
def test_a_reassigned_parameter_is_noticed(pair: Pair, adapter: Any) -> None:
    if adapter is not None:
        pair.add("a", adapter)
    before, _ = pair.outputs()

    def reassign(model: Any) -> None:
        _layer(model).weight = torch.nn.Parameter(_layer(model).weight.detach() * 1.5 + 0.02)

    pair.both(reassign)
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert relative_l2(seen, before) > EFFECT / 10
    if adapter is not None:
        pair.both(lambda model: model.unload_lora())
        assert pair.error() <= LORA_BOUND


@pytest.mark.parametrize("adapter", [lora("to_k"), lora("to_q"), lora("proj_out")], ids=["on it", "beside", "far"])
def test_what_was_reassigned_shares_its_bases_memory_again(pair: Pair, adapter: Any) -> None:
    """No second copy stays, and what another LoRA points nothing anew for was pointed at the right place before."""
    pair.add("a", adapter)
    pair.outputs()
    layer = _layer(pair.ours)
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)
    pair.outputs()
    weights = pair.ours._trt_state.module.weights
    for change in (lambda: None, pair.ours.disable_lora, pair.ours.enable_lora):
        change()
        pair.outputs()
        base = weights.base("double_blocks.1.img_attn.qkv.weight")
        assert layer.weight.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
        assert torch.equal(layer.weight, base.chunk(3)[1])


def test_replaced_data_and_loaded_state_are_noticed(pair: Pair) -> None:
    pair.outputs()
    other = tiny_transformer(seed=3)

    def new_data(model: Any) -> None:
        model.proj_out.weight.data = other.proj_out.weight.data.clone()

    pair.both(new_data)
    assert pair.error() <= LORA_BOUND
    pair.add("a", lora())
    pair.outputs()
    pair.both(lambda model: model.unload_lora())
    pair.both(lambda model: model.load_state_dict(other.state_dict()))
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert relative_l2(seen, run_diffusers(other, call_inputs(other))) <= LORA_BOUND


def test_a_replaced_block_is_noticed_under_a_lora(pair: Pair) -> None:
    pair.add("a", lora())
    pair.outputs()
    donor = tiny_transformer(seed=9)

    def replace(model: Any) -> None:
        model.transformer_blocks[0].load_state_dict(model.transformer_blocks[0].state_dict())
        model.single_transformer_blocks[1] = donor.single_transformer_blocks[1]

    pair.both(replace)
    assert pair.error() <= LORA_BOUND


def test_exchanged_blocks_are_noticed(pair: Pair) -> None:
    pair.add("a", lora())
    before, _ = pair.outputs()

    def exchange(model: Any) -> None:
        first, second = model.transformer_blocks
        model.transformer_blocks[0], model.transformer_blocks[1] = second, first

    pair.both(exchange)
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert relative_l2(seen, before) > EFFECT


def test_twenty_random_moves_agree(tmp_path: Path) -> None:
    """Any order of diffusers' calls: at the end nothing has drifted."""
    pair, choices = Pair(tmp_path, tiny_transformer()), random.Random(2)
    base, _ = pair.outputs()
    pair.add("a", lora(*ATTENTION))
    pair.add("b", lora("to_k", "proj_out", rank=8))
    moves = (
        lambda model: model.set_adapters("a", 0.5),
        lambda model: model.set_adapters("b", -1.0),
        lambda model: model.set_adapters(["a", "b"], [1.0, 0.25]),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: model.state_dict(),
        lambda model: model.to(torch.float32),
    )
    for _ in range(20):
        pair.both(choices.choice(moves))
        assert pair.error() <= LORA_BOUND
    pair.both(lambda model: model.unload_lora())
    assert torch.equal(pair.outputs()[0], base)
    assert pair.report.builds == 1


def test_what_did_not_change_is_not_read_again_and_what_did_is() -> None:
    """Patches stay the same objects from step to step, but for the layer whose adapter or base is another."""
    model: Any = tiny_transformer()
    model.add_adapter(lora("to_q", "proj_out"), adapter_name="a")
    binding = DiffusersBinding(model, architecture_of(model))
    reader = PeftReader(binding.slots)
    first = reader.read().weights
    assert len(first) == 7
    again = reader.read().weights
    assert all(again[name] is patches for name, patches in first.items())
    with torch.no_grad():
        model.transformer_blocks[1].attn.to_q.lora_B["a"].weight.mul_(2.0)
        model.transformer_blocks[0].attn.to_k.weight.mul_(2.0)
    changed = reader.read().weights
    assert {name for name, patches in changed.items() if patches is not first[name]} == {
        "double_blocks.0.img_attn.qkv.weight", "double_blocks.1.img_attn.qkv.weight",
    }  # fmt: skip
    assert all(changed[name].signature != first[name].signature for name in changed if changed[name] is not first[name])
    model.set_adapters("a", 0.5)
    assert not [n for n, patches in reader.read().weights.items() if patches.signature == changed[n].signature]
    model.disable_adapters()
    assert reader.read().weights == {}
    model.enable_adapters()
    assert reader.read().weights.keys() == first.keys()


@pytest.mark.parametrize("how", ["deleted", "disabled"])
def test_adapters_that_are_gone_are_let_go_of(how: str) -> None:
    model: Any = tiny_transformer()
    model.add_adapter(lora("to_q"), adapter_name="a")
    reader = PeftReader(DiffusersBinding(model, architecture_of(model)).slots)
    assert reader.read().weights
    if how == "deleted":
        model.delete_adapters("a")
    else:
        model.disable_adapters()
    assert reader.read().weights == {}
    assert not reader._weights
    assert not [reading for reading in reader._readings if reading is not None and reading.patches]
