"""PEFT's other methods: what is a sum is merged, the rest runs in diffusers' own block, and nothing is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from peft import PeftConfig

from tests.unit.diffusers_pair import ATTENTION, LORA_BOUND, Pair, lora
from trt_core.backends.check import relative_l2
from trt_core.errors import UnsupportedModel

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
EFFECT = 0.003
NUMBERS = {"r": 4, "target_modules": ["to_q", "proj_out"], "init_weights": False}
MERGED: dict[str, Callable[[], PeftConfig]] = {
    "rsLoRA": lambda: lora("to_q", "proj_out", use_rslora=True),
    "ranks per layer": lambda: lora("to_q", "proj_out", rank_pattern={"proj_out": 9}, alpha_pattern={"to_q": 3}),
    "bias": lambda: lora("to_q", "proj_mlp", lora_bias=True),
    "DoRA": lambda: lora(*ATTENTION, "proj_out", use_dora=True),
    "PiSSA": lambda: peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights="pissa"),
    "LoHa": lambda: peft.LoHaConfig(alpha=6, **NUMBERS),
    "LoKr": lambda: peft.LoKrConfig(alpha=6, **NUMBERS),
    "LoKr of two products": lambda: peft.LoKrConfig(alpha=2, decompose_both=True, **{**NUMBERS, "r": 2}),
}
NOT_MERGED: dict[str, Callable[[], PeftConfig]] = {
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["to_q"], init_weights=False),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=["to_q"], init_weights=False),
    "IA3": lambda: peft.IA3Config(target_modules=["to_q"], feedforward_modules=[], init_ia3_weights=False),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=4, total_step=10, target_modules=["to_q"], init_lora_weights=False
    ),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=99, target_modules=["to_q"], init_weights=False),
}
ALL_BLOCKS = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.mark.parametrize("method", MERGED)
def test_what_is_a_sum_is_merged(method: str, pair: Pair) -> None:
    base, _ = pair.outputs()
    pair.add("a", MERGED[method]())
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    if method != "PiSSA":  # which moves a part of the weight into the adapter, so that the sum stays
        assert relative_l2(expected, base) > EFFECT
    assert pair.report.eager_blocks == {}
    assert pair.layers >= 4
    first = pair.report.last_refit
    pair.outputs()
    assert pair.report.last_refit is first, "it was merged again although nothing changed"


@pytest.mark.parametrize("config", NOT_MERGED.values(), ids=NOT_MERGED)
def test_what_is_no_sum_runs_in_diffusers_own_block(config: Callable[[], PeftConfig], pair: Pair) -> None:
    base, _ = pair.outputs()
    pair.add("a", config())
    seen, expected = pair.outputs()
    assert relative_l2(seen, expected) <= LORA_BOUND
    assert relative_l2(expected, base) > EFFECT / 100
    assert sorted(pair.report.eager_blocks) == ALL_BLOCKS
    assert all("adapter 'a'" in reason for reason in pair.report.eager_blocks.values())


def test_only_the_blocks_that_hold_it_run_eagerly(pair: Pair) -> None:
    pair.add("plain", lora("to_k", "to_v", "proj_mlp"))
    pair.add(
        "turn",
        peft.OFTConfig(r=0, oft_block_size=8, target_modules=r"transformer_blocks\.1\.attn\.to_q", init_weights=False),
    )
    assert pair.error() <= LORA_BOUND
    assert list(pair.report.eager_blocks) == ["double_blocks.1"]


def test_outside_the_blocks_the_whole_model_runs_eagerly_and_back(pair: Pair) -> None:
    pair.add("turn", peft.OFTConfig(r=0, oft_block_size=8, target_modules=["x_embedder"], init_weights=False))
    assert pair.error() <= LORA_BOUND
    assert list(pair.report.eager_blocks) == ["the whole model"]
    pair.both(lambda model: model.delete_adapters("turn"))
    assert pair.error() <= LORA_BOUND
    assert pair.report.eager_blocks == {}


def test_dora_beside_a_plain_lora(pair: Pair) -> None:
    pair.add("a", lora("to_q", "to_k", use_dora=True))
    pair.add("b", lora("to_q", "proj_out"))
    for strengths in ([1.0, 1.0], [0.5, -1.0], [0.0, 1.0]):
        pair.both(lambda model, s=strengths: model.set_adapters(["a", "b"], s))
        assert pair.error() <= LORA_BOUND


def test_modules_to_save_are_refused_with_a_reason(pair: Pair) -> None:
    pair.add("a", lora("to_q", modules_to_save=["proj_out"]))
    with pytest.raises(UnsupportedModel, match="ModulesToSaveWrapper stands in its place"):
        pair.outputs()
