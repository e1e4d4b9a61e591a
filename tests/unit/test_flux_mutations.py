"""The comparison with diffusers has power: every plausible mistake, made on purpose, makes it fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.unit.tiny_flux import FP32_BOUND, bfl_weights, fp32_error, tiny_transformer
from trt_core import step
from trt_core.flux import fused, linear, rope, segments, stem
from trt_core.flux.open_sum import OpenSum

Weights = dict[str, Tensor]


def zeroed(name: str) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: torch.zeros_like(weights[name])})


def transposed(name: str) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: weights[name].T.contiguous()})


def rolled(name: str, rows: int = 1) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: weights[name].roll(rows, 0)})


def stale(name: str, other: str) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: weights[other].clone()})


HIDDEN = 64
WEIGHT_MISTAKES = {
    **{
        f"no {name}": zeroed(name)
        for name in (
            "img_in.bias", "time_in.in_layer.bias", "vector_in.out_layer.bias", "guidance_in.in_layer.bias",
            "double_blocks.0.img_mod.lin.bias", "double_blocks.0.img_attn.qkv.bias",
            "double_blocks.1.txt_attn.qkv.bias", "double_blocks.0.img_attn.proj.bias",
            "double_blocks.0.txt_attn.proj.bias", "double_blocks.1.img_mlp.0.bias", "double_blocks.1.txt_mlp.2.bias",
            "single_blocks.0.linear1.bias", "single_blocks.1.linear2.bias", "single_blocks.1.modulation.lin.bias",
            "final_layer.linear.bias", "final_layer.adaLN_modulation.1.bias",
        )
    },
    "transposed img_attn.proj": transposed("double_blocks.0.img_attn.proj.weight"),
    "transposed txt_attn.proj": transposed("double_blocks.1.txt_attn.proj.weight"),
    "transposed time_in.out_layer": transposed("time_in.out_layer.weight"),
    "stale query norm": stale(
        "double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.1.img_attn.norm.query_norm.scale"
    ),
    "query norm for key norm": stale("single_blocks.0.norm.key_norm.scale", "single_blocks.0.norm.query_norm.scale"),
    "rotated key norm": rolled("double_blocks.0.txt_attn.norm.key_norm.scale"),
    "rotated query norm": rolled("single_blocks.1.norm.query_norm.scale"),
    "q, k, v in another order": rolled("double_blocks.0.img_attn.qkv.weight", HIDDEN),
    "shift, scale, gate in another order": rolled("double_blocks.0.img_mod.lin.weight", HIDDEN),
    "attention and mlp modulation exchanged": rolled("double_blocks.1.txt_mod.lin.weight", 3 * HIDDEN),
    "final shift and scale exchanged": rolled("final_layer.adaLN_modulation.1.weight", HIDDEN),
    "linear1 with the mlp first": rolled("single_blocks.0.linear1.weight", 4 * HIDDEN),
}  # fmt: skip


def _axes_swapped(ids: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return rope.rope_cos_sin(ids[:, [0, 2, 1]], *args)


def _backwards(ids: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    cos, sin = rope.rope_cos_sin(ids, *args)
    return cos.flip(0), sin.flip(0)


def _pairs_by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _key_as_value(wide: Tensor, q: Tensor) -> Tensor:
    return wide[..., HIDDEN : 2 * HIDDEN].unflatten(-1, q.shape[-2:])


def _ungated(stream: OpenSum) -> Tensor:
    """Zeros, the gate before the first block, stay: nothing has been added there yet."""
    return stream.x + stream.gate.ne(0)[:, None, :] * stream.add


CODE_MISTAKES = {
    "RoPE axes exchanged": (step, "rope_cos_sin", _axes_swapped),
    "RoPE of another theta": (step, "rope_cos_sin", lambda ids, axes, _: rope.rope_cos_sin(ids, axes, 1e3)),
    "RoPE backwards over tokens": (step, "rope_cos_sin", _backwards),
    "RoPE turning the other way": (fused, "rotate", lambda x, cos, sin: rope.rotate(x, cos, -sin)),
    "RoPE pairing halves": (fused, "rotate", _pairs_by_halves),
    "no RoPE": (fused, "rotate", lambda x, cos, sin: x),
    "shift and scale exchanged": (
        linear, "modulated_norm", lambda x, shift, scale: stem.modulated_norm(x, scale, shift)
    ),
    "scale without 1 +": (
        linear, "modulated_norm",
        lambda x, shift, scale: stem.modulated_norm(x, shift, scale - 1),
    ),
    "layer norm's epsilon": (fused, "EPS", 1e-2),
    "no q/k norm": (fused, "rms_norm", lambda x, scale: x * scale),
    "q/k norm without gain": (fused, "rms_norm", lambda x, scale: functional.rms_norm(x, x.shape[-1:])),
    "no gate": (OpenSum, "closed", _ungated),
    "exact gelu": (
        segments, "gelu_linear",
        lambda x, w, b: functional.linear(functional.gelu(x), w, b),
    ),
    "k in place of v": (segments, "value_of", _key_as_value),
    "sines before cosines": (
        stem, "timestep_embedding", lambda t, real=stem.timestep_embedding: real(t).roll(128, -1)
    ),
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["plain", "adversarial"])
def adversarial(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("mistake", WEIGHT_MISTAKES.values(), ids=WEIGHT_MISTAKES)
def test_a_wrong_weight_is_seen(mistake: Callable[[Weights], None], adversarial: bool, tmp_path: Path) -> None:
    model = tiny_transformer(adversarial=adversarial)
    weights = bfl_weights(model)
    mistake(weights)
    assert fp32_error(model, weights, tmp_path, batch=2) > FP32_BOUND


@pytest.mark.parametrize("mistake", CODE_MISTAKES.values(), ids=CODE_MISTAKES)
def test_wrong_code_is_seen(
    mistake: tuple[object, str, object], adversarial: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mistake[1] == "value_of":  # execution.py holds its own name for it
        monkeypatch.setattr("trt_core.execution.value_of", mistake[2])
    monkeypatch.setattr(*mistake)
    model = tiny_transformer(adversarial=adversarial)
    assert fp32_error(model, bfl_weights(model), tmp_path, batch=2) > FP32_BOUND
