"""Every key and shape that does not fit is refused, and the error says which."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.lora_files import (
    BASE,
    HEAD,
    HIDDEN,
    IN_CHANNELS,
    MLP,
    PROJ,
    QKV,
    SHAPES,
    factors,
    flat,
    kohya,
    peft,
    tiny_shapes,
)
from trt_core.errors import InvalidFile, LoraMismatch
from trt_core.lora import read_keys


def test_two_different_loras_in_one_file_are_refused() -> None:
    first = peft(PROJ, *factors((HIDDEN, HIDDEN), 2, 1), adapter="first")
    second = peft(PROJ, *factors((HIDDEN, HIDDEN), 2, 2), adapter="second")
    other_naming = peft(f"diffusion_model.{PROJ}", *factors((HIDDEN, HIDDEN), 2, 2))
    for tensors in (first | second, first | other_naming):
        with pytest.raises(LoraMismatch, match="two different tensors for one layer"):
            read_keys(tensors, SHAPES)


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        (
            "SDXL",
            [
                "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
            ],
        ),
        ("Stable Diffusion 1.5 or SDXL", ["lora_unet_up_blocks_1_attentions_0_proj_in.lora_down.weight"]),
        ("Stable Diffusion 1.5 or SDXL", ["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"]),
        ("Stable Diffusion 3", ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"]),
        ("FLUX.2", ["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"]),
        ("Chroma", ["diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight"]),
        ("Qwen-Image", ["transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight"]),
        ("HunyuanVideo", ["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"]),
        ("Wan", ["diffusion_model.blocks.0.cross_attn.k.lora_A.weight"]),
        ("Z-Image or Lumina 2", ["diffusion_model.layers.0.attention.qkv.lora_A.weight"]),
    ],
)
def test_a_lora_for_another_model_is_named(model: str, keys: list[str]) -> None:
    with pytest.raises(LoraMismatch, match=f"seems to be made for {model}\\.") as caught:
        read_keys(dict.fromkeys(keys, torch.ones(2, 2)), SHAPES)
    assert keys[0] in str(caught.value)


def test_one_unknown_key_among_good_ones_refuses_the_file_and_names_the_first_three() -> None:
    good = kohya(f"lora_unet_{flat(PROJ)}", *factors((HIDDEN, HIDDEN), 2, 1))
    unknown = [f"lora_unet_double_blocks_{index}_img_attn_proj.alpha" for index in range(2, 7)]
    with pytest.raises(LoraMismatch) as caught:
        read_keys(good | dict.fromkeys(unknown, torch.tensor(1.0)), SHAPES)
    text = str(caught.value)
    assert "5 of 7" in text
    assert "2 double and 2 single blocks" in text
    assert all(key in text for key in unknown[:3])
    assert unknown[3] not in text


def test_a_key_with_an_unknown_end_is_refused() -> None:
    tensors = kohya(f"lora_unet_{flat(PROJ)}", *factors((HIDDEN, HIDDEN), 2, 1))
    with pytest.raises(LoraMismatch, match=r"img_attn_proj\.surprise"):
        read_keys(tensors | {f"lora_unet_{flat(PROJ)}.surprise": torch.ones(1)}, SHAPES)


def test_guidance_on_a_model_without_it() -> None:
    tensors = kohya("lora_unet_guidance_in_in_layer", *factors(SHAPES["guidance_in.in_layer.weight"], 2, 1))
    assert len(read_keys(tensors, SHAPES).patches) == 1
    with pytest.raises(LoraMismatch, match=r"made for FLUX\.1-dev"):
        read_keys(tensors, tiny_shapes(guidance=False))


GOOD = kohya(QKV, torch.ones(2, HIDDEN), torch.ones(3 * HIDDEN, 2))
LOHA = {"hada_w1_a": (HIDDEN, 2), "hada_w1_b": (2, HIDDEN), "hada_w2_a": (HIDDEN + 1, 2), "hada_w2_b": (2, HIDDEN)}


def pair(module: str, down: tuple[int, int], up: tuple[int, int]) -> dict[str, Tensor]:
    return kohya(module, torch.ones(down), torch.ones(up))


def ones(module: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"{module}.{end}": torch.ones(shape) for end, shape in shapes.items()}


# tensors, the end of the key that is named, its shape, the shape it should have
WRONG = {
    "down": (pair(QKV, (2, HIDDEN + 1), (3 * HIDDEN, 2)), "lora_down.weight", [2, HIDDEN + 1], [2, HIDDEN]),
    "up": (pair(QKV, (2, HIDDEN), (HIDDEN, 2)), "lora_up.weight", [HIDDEN, 2], [3 * HIDDEN, 2]),
    "rank": (pair(QKV, (2, HIDDEN), (3 * HIDDEN, 3)), "lora_up.weight", [3 * HIDDEN, 3], [3 * HIDDEN, 2]),
    "rows": (
        pair("transformer_blocks.0.attn.to_q", (2, HIDDEN), (3 * HIDDEN, 2)),
        "lora_up.weight",
        [3 * HIDDEN, 2],
        [HIDDEN, 2],
    ),
    "last rows": (
        pair("single_transformer_blocks.0.proj_mlp", (2, HIDDEN), (HIDDEN, 2)),
        "lora_up.weight",
        [HIDDEN, 2],
        [MLP, 2],
    ),
    "diff": (ones(QKV, diff=(HIDDEN, HIDDEN)), "diff", [HIDDEN, HIDDEN], [3 * HIDDEN, HIDDEN]),
    "bias": (ones(QKV, diff_b=(HIDDEN,)), "diff_b", [HIDDEN], [3 * HIDDEN]),
    "lokr": (ones(PROJ, lokr_w1=(4, 4), lokr_w2=(4, 5)), "lokr_w1", [HIDDEN, 20], [HIDDEN, HIDDEN]),
    "loha": (ones(PROJ, **LOHA), "hada_w2_a", [HIDDEN + 1, 2], [HIDDEN, 2]),
    "dora": (GOOD | ones(QKV, dora_scale=(7, 1)), "dora_scale", [7, 1], [3 * HIDDEN, 1]),
    "magnitude": (
        GOOD | ones(QKV, lora_magnitude_vector=(7,)),
        "lora_magnitude_vector",
        [7],
        [3 * HIDDEN],
    ),
    "alpha": (GOOD | ones(QKV, alpha=(3,)), "alpha", [3], []),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_shape_names_key_seen_and_expected(case: str) -> None:
    tensors, key, seen, expected = WRONG[case]
    with pytest.raises(LoraMismatch) as caught:
        read_keys(tensors, SHAPES)
    assert f".{key}'" in caught.value.what
    assert str(seen) in caught.value.what
    assert str(expected) in caught.value.expected


def test_a_control_lora_on_a_model_with_fewer_input_channels_says_so() -> None:
    tensors = peft("img_in", *factors((HIDDEN, 2 * IN_CHANNELS), 2, 1))
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(HEAD)
    with pytest.raises(LoraMismatch, match="Control, Depth, Canny or Fill LoRA needs the model"):
        read_keys(tensors, SHAPES)


@pytest.mark.parametrize("missing", [".lora_down.weight", ".lora_up.weight"])
def test_half_a_pair_of_factors_is_refused(missing: str) -> None:
    tensors = kohya(QKV, *factors((3 * HIDDEN, HIDDEN), 2, 1), alpha=1)
    del tensors[QKV + missing]
    with pytest.raises(LoraMismatch, match=r"incomplete or damaged"):
        read_keys(tensors, SHAPES)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{PROJ}.hada_w1_a": torch.ones(HIDDEN, 2)},
        {f"{PROJ}.lokr_w1": torch.ones(4, 4)},
        {f"{PROJ}.lokr_w1": torch.ones(4, 4), f"{PROJ}.lokr_w2_b": torch.ones(2, 4)},
        {f"{PROJ}.dora_scale": torch.ones(HIDDEN, 1)},
        {f"{PROJ}.lora_B.bias": torch.ones(HIDDEN)},
        kohya(PROJ, torch.ones(0, HIDDEN), torch.ones(HIDDEN, 0)),
        kohya("double_blocks.0.img_attn.norm.query_norm", torch.ones(2, HEAD), torch.ones(HEAD, 2)),
    ],
    ids=["loha", "lokr", "lokr side", "dora", "bias", "rank 0", "factors of a norm"],
)
def test_incomplete_modules_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(LoraMismatch, match="incomplete or damaged"):
        read_keys(tensors, SHAPES)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("lora_mid.weight", "convolution"),
        ("hada_t1", "convolution"),
        ("lokr_t2", "convolution"),
        ("reshape_weight", "Control LoRA"),
        ("oft_blocks", "not supported"),
        ("a1.weight", "not supported"),
        ("wd_for_diff", "not supported"),
    ],
)
def test_methods_that_do_not_exist_here_are_refused_with_the_reason(end: str, reason: str) -> None:
    tensors = kohya(PROJ, *factors((HIDDEN, HIDDEN), 2, 1)) | {f"{PROJ}.{end}": torch.ones(2)}
    with pytest.raises(LoraMismatch, match=reason):
        read_keys(tensors, SHAPES)


def test_a_bias_that_the_layer_does_not_have_is_refused() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != f"{PROJ}.bias"}
    with pytest.raises(LoraMismatch, match="changes a bias"):
        read_keys({f"{PROJ}.diff_b": torch.ones(HIDDEN)}, shapes)


def test_a_checkpoint_is_no_lora() -> None:
    with pytest.raises(InvalidFile, match="looks like a checkpoint"):
        read_keys(BASE, SHAPES)
    with pytest.raises(InvalidFile, match="No key of this file belongs to a LoRA"):
        read_keys({"something": torch.ones(1)}, SHAPES)
