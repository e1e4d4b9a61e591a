"""LoHa, LoKr, DoRA, differences, biases and norms in LoRA files, and where alpha comes from."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.unit.lora_files import (
    BASE,
    HIDDEN,
    PROJ,
    QKV,
    SHAPES,
    assert_weights,
    factors,
    flat,
    kohya,
    merge,
    peft,
    random_tensor,
)
from trt_core.errors import InvalidFile
from trt_core.lora import Dora, DoraRule, read_keys

K, V = slice(HIDDEN, 2 * HIDDEN), slice(2 * HIDDEN, 3 * HIDDEN)


def test_loha_keys() -> None:
    w1_b, w1_a = factors(SHAPES[f"{QKV}.weight"], 3, 1)
    w2_b, w2_a = factors(SHAPES[f"{QKV}.weight"], 3, 2)
    hada = {
        "hada_w1_a": w1_a,
        "hada_w1_b": w1_b,
        "hada_w2_a": w2_a,
        "hada_w2_b": w2_b,
        "alpha": torch.tensor(1.5),
    }
    tensors = {f"lora_unet_{flat(QKV)}.{end}": tensor for end, tensor in hada.items()}
    expected = BASE[f"{QKV}.weight"] + 0.5 * (w1_a @ w1_b) * (w2_a @ w2_b)
    assert_weights(merge(tensors), {f"{QKV}.weight": expected})


@pytest.mark.parametrize("full1", [True, False])
@pytest.mark.parametrize("full2", [True, False])
@pytest.mark.parametrize("module", [f"lora_unet_{flat(QKV)}", f"diffusion_model.{QKV}"])
def test_lokr_keys(full1: bool, full2: bool, module: str) -> None:
    """Alpha counts only where a side is a product: LyCORIS writes 1e10 for two full sides."""
    b1, a1 = factors((6, 4), 2, 1)
    b2, a2 = factors((8, 4), 2, 2)
    sides = {"lokr_w1": a1 @ b1} if full1 else {"lokr_w1_a": a1, "lokr_w1_b": b1}
    sides |= {"lokr_w2": a2 @ b2} if full2 else {"lokr_w2_a": a2, "lokr_w2_b": b2}
    alpha, scale = (1e10, 1.0) if full1 and full2 else (3.0, 1.5)
    tensors = {f"{module}.{end}": tensor for end, tensor in sides.items()} | {f"{module}.alpha": torch.tensor(alpha)}
    expected = BASE[f"{QKV}.weight"] + scale * torch.kron(a1 @ b1, a2 @ b2)
    assert_weights(merge(tensors), {f"{QKV}.weight": expected})


def test_lokr_on_the_rows_of_a_split_weight() -> None:
    w1, w2 = random_tensor(4, 4, seed=1), random_tensor(4, 4, seed=2)
    module = "lycoris_transformer_blocks_0_attn_to_v"
    expected = BASE[f"{QKV}.weight"].clone()
    expected[V] += torch.kron(w1, w2)
    assert_weights(merge({f"{module}.lokr_w1": w1, f"{module}.lokr_w2": w2}), {f"{QKV}.weight": expected})


def test_whole_differences_of_weight_bias_and_norm() -> None:
    norm = "double_blocks.0.img_attn.norm.query_norm"
    diff, bias, scale = (
        random_tensor(*SHAPES[name], seed=5) for name in (f"{QKV}.weight", f"{QKV}.bias", f"{norm}.scale")
    )
    expected = {
        f"{QKV}.weight": BASE[f"{QKV}.weight"] + diff,
        f"{QKV}.bias": BASE[f"{QKV}.bias"] + bias,
        f"{norm}.scale": BASE[f"{norm}.scale"] + scale,
    }
    for norm_key in (
        f"lora_unet_{flat(norm)}.diff",
        f"lora_unet_{flat(norm)}.w_norm",
        f"diffusion_model.{norm}.scale.diff",
    ):
        tensors = {
            f"lora_unet_{flat(QKV)}.diff": diff,
            f"lora_unet_{flat(QKV)}.diff_b": bias,
            norm_key: scale,
        }
        assert_weights(merge(tensors), expected)


def test_a_bias_difference_of_a_split_weight_changes_its_rows() -> None:
    diff = random_tensor(HIDDEN, seed=5)
    expected = BASE["single_blocks.1.linear1.bias"].clone()
    expected[K] += diff
    tensors = {"transformer.single_transformer_blocks.1.attn.to_k.diff_b": diff}
    assert_weights(merge(tensors), {"single_blocks.1.linear1.bias": expected})


def test_the_bias_of_lora_b_takes_the_scale_of_its_factors() -> None:
    down, up = factors(SHAPES[f"{PROJ}.weight"], 2, 1)
    bias = random_tensor(HIDDEN, seed=2)
    tensors = peft(PROJ, down, up) | {f"{PROJ}.lora_B.bias": bias, f"{PROJ}.alpha": torch.tensor(3.0)}
    expected = {
        f"{PROJ}.weight": BASE[f"{PROJ}.weight"] + 1.5 * up @ down,
        f"{PROJ}.bias": BASE[f"{PROJ}.bias"] + 1.5 * bias,
    }
    assert_weights(merge(tensors), expected)


NORMS = {
    "double_blocks.0.txt_attn.norm.key_norm.scale": "double_blocks.0.txt_attn.norm.key_norm.scale",
    "single_blocks.1.norm.query_norm.scale": "single_blocks.1.norm.query_norm.scale",
    "transformer.transformer_blocks.0.attn.norm_q.weight": "double_blocks.0.img_attn.norm.query_norm.scale",
    "transformer.transformer_blocks.0.attn.norm_k.weight": "double_blocks.0.img_attn.norm.key_norm.scale",
    "transformer.transformer_blocks.1.attn.norm_added_q.weight": "double_blocks.1.txt_attn.norm.query_norm.scale",
    "transformer.transformer_blocks.1.attn.norm_added_k.weight": "double_blocks.1.txt_attn.norm.key_norm.scale",
    "transformer.single_transformer_blocks.1.attn.norm_q.weight": "single_blocks.1.norm.query_norm.scale",
    "transformer.single_transformer_blocks.1.attn.norm_k.weight": "single_blocks.1.norm.key_norm.scale",
    f"diffusion_model.{PROJ}.set_weight": f"{PROJ}.weight",
}


@pytest.mark.parametrize(("key", "name"), NORMS.items())
def test_control_loras_replace_norms_whole(key: str, name: str) -> None:
    value = random_tensor(*SHAPES[name], seed=5)
    down, up = factors(SHAPES[f"{QKV}.weight"], 2, 1)
    seen = merge(peft(QKV, down, up) | {key: value})
    assert torch.equal(seen[name], value)
    torch.testing.assert_close(seen[f"{QKV}.weight"], BASE[f"{QKV}.weight"] + up @ down)


def test_a_lora_of_1_by_1_convolutions_is_one_of_matrices() -> None:
    down, up = factors(SHAPES[f"{PROJ}.weight"], 2, 1)
    tensors = kohya(f"lora_unet_{flat(PROJ)}", down[..., None, None], up[..., None, None])
    assert_weights(merge(tensors), {f"{PROJ}.weight": BASE[f"{PROJ}.weight"] + up @ down})


@pytest.mark.parametrize(
    ("end", "shape", "rule"),
    [
        ("lora_magnitude_vector", (HIDDEN,), DoraRule.PEFT),
        ("lora_magnitude_vector.weight", (HIDDEN,), DoraRule.PEFT),
        ("lora_magnitude_vector.default.weight", (HIDDEN,), DoraRule.PEFT),
        ("dora_scale", (HIDDEN,), DoraRule.PEFT),
        ("dora_scale", (HIDDEN, 1), DoraRule.COMFYUI),
        ("dora_scale", (1, HIDDEN), DoraRule.COMFYUI),
    ],
)
def test_dora_keys(end: str, shape: tuple[int, ...], rule: DoraRule) -> None:
    down, up = factors((HIDDEN, HIDDEN), 2, 1)
    magnitude = random_tensor(*shape, seed=3)
    (patch,) = read_keys(kohya(PROJ, down, up, 3) | {f"{PROJ}.{end}": magnitude}, SHAPES).patches
    assert isinstance(patch.change, Dora)
    assert (patch.change.rule, patch.change.inner.scale) == (rule, 1.5)
    assert torch.equal(patch.change.magnitude, magnitude)


def test_dora_on_lokr_and_on_loha() -> None:
    w1, w2 = random_tensor(4, 4, seed=1), random_tensor(4, 4, seed=2)
    lokr = {
        f"{PROJ}.lokr_w1": w1,
        f"{PROJ}.lokr_w2": w2,
        f"{PROJ}.dora_scale": random_tensor(1, HIDDEN, seed=3),
    }
    total = BASE[f"{PROJ}.weight"] + torch.kron(w1, w2)
    expected = total * lokr[f"{PROJ}.dora_scale"] / total.norm(dim=0, keepdim=True)
    assert_weights(merge(lokr), {f"{PROJ}.weight": expected})


CONFIG = {"transformer.lora_alpha": 6, "transformer.r": 2}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"text_encoder.lora_alpha": 6}, 1.0),
        ({"text_encoder.lora_alpha": 6, "lora_alpha": 8}, 4.0),
        (CONFIG, 3.0),
        (CONFIG | {"text_encoder.lora_alpha": 8}, 3.0),
        ({"lora_alpha": 6, "r": 2, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 4}}, 2.0),
        (CONFIG | {"transformer.use_rslora": True}, 6 / math.sqrt(2)),
        (CONFIG | {"transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 1}}, 0.5),
        (CONFIG | {"transformer.alpha_pattern": {"to_q": 1}}, 0.5),
        (CONFIG | {"transformer.alpha_pattern": {"to_k": 1}}, 3.0),
    ],
)
def test_alpha_from_the_config_that_diffusers_saves(config: dict[str, object], scale: float) -> None:
    tensors = peft("transformer.transformer_blocks.0.attn.to_q", *factors((HIDDEN, HIDDEN), 2, 1))
    (patch,) = read_keys(tensors, SHAPES, {"lora_adapter_metadata": json.dumps(config)}).patches
    assert patch.change.scale == scale


def test_an_alpha_tensor_counts_more_than_the_config() -> None:
    tensors = kohya("transformer.transformer_blocks.0.attn.to_q", *factors((HIDDEN, HIDDEN), 2, 1), alpha=5)
    (patch,) = read_keys(tensors, SHAPES, {"lora_adapter_metadata": json.dumps(CONFIG)}).patches
    assert patch.change.scale == 2.5


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"transformer.lora_alpha": "x"}', '{"transformer.alpha_pattern": {"(": 1}}']
)
def test_a_config_that_cannot_be_read_is_refused(text: str) -> None:
    tensors = peft("proj_out", *factors(SHAPES["final_layer.linear.weight"], 2, 1))
    with pytest.raises(InvalidFile, match="lora_adapter_metadata"):
        read_keys(tensors, SHAPES, {"lora_adapter_metadata": text})
