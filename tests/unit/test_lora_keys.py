"""Every naming of LoRA keys, against dense references and against the weights that diffusers fuses."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tests.unit.lora_files import (
    BASE,
    HEAD,
    HIDDEN,
    IN_CHANNELS,
    PROJ,
    QKV,
    SHAPES,
    TEXT,
    VECTOR,
    assert_weights,
    factors,
    flat,
    kohya,
    merge,
    peft,
    random_tensor,
    tiny_shapes,
)
from trt_core.lora import LoraFormat, merged, read_keys
from trt_core.lora.targets import TargetTable

Q, K, V = (slice(i * HIDDEN, (i + 1) * HIDDEN) for i in range(3))
MLP_ROWS = slice(3 * HIDDEN, None)

# module in a diffusers file -> (BFL weight, its rows); written down by hand from the two models' definitions.
DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", Q),
    "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", K),
    "transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", V),
    "transformer_blocks.1.attn.add_q_proj": ("double_blocks.1.txt_attn.qkv", Q),
    "transformer_blocks.0.attn.add_k_proj": ("double_blocks.0.txt_attn.qkv", K),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", V),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", slice(None)),
    "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj", slice(None)),
    "transformer_blocks.0.ff.net.0.proj": ("double_blocks.0.img_mlp.0", slice(None)),
    "transformer_blocks.0.ff.net.2": ("double_blocks.0.img_mlp.2", slice(None)),
    "transformer_blocks.0.ff_context.net.0.proj": ("double_blocks.0.txt_mlp.0", slice(None)),
    "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", slice(None)),
    "transformer_blocks.0.norm1.linear": ("double_blocks.0.img_mod.lin", slice(None)),
    "transformer_blocks.0.norm1_context.linear": ("double_blocks.0.txt_mod.lin", slice(None)),
    "single_transformer_blocks.1.attn.to_q": ("single_blocks.1.linear1", Q),
    "single_transformer_blocks.1.attn.to_k": ("single_blocks.1.linear1", K),
    "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", V),
    "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", MLP_ROWS),
    "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", slice(None)),
    "single_transformer_blocks.0.norm.linear": ("single_blocks.0.modulation.lin", slice(None)),
    "x_embedder": ("img_in", slice(None)),
    "context_embedder": ("txt_in", slice(None)),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", slice(None)),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", slice(None)),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", slice(None)),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", slice(None)),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.in_layer", slice(None)),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", slice(None)),
    "proj_out": ("final_layer.linear", slice(None)),
}
BFL = {
    module: (module, slice(None))
    for module in (name.removesuffix(".weight") for name in SHAPES if name.endswith(".weight"))
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", slice(None)),
    "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", slice(None)),
    "double_blocks.1.processor.proj_lora1": ("double_blocks.1.img_attn.proj", slice(None)),
    "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", slice(None)),
    "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1", slice(0, 3 * HIDDEN)),
    "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", slice(None)),
}
OMI = {
    "double_blocks.0.img_attn.qkv.0": ("double_blocks.0.img_attn.qkv", Q),
    "double_blocks.0.txt_attn.qkv.1": ("double_blocks.0.txt_attn.qkv", K),
    "double_blocks.1.img_attn.qkv.2": ("double_blocks.1.img_attn.qkv", V),
    "single_blocks.0.linear1.2": ("single_blocks.0.linear1", V),
    "single_blocks.0.linear1.3": ("single_blocks.0.linear1", MLP_ROWS),
    "img_in.proj": ("img_in", slice(None)),
}


NAMINGS = {
    "kohya": (BFL, lambda module: f"lora_unet_{flat(module)}", "kohya", LoraFormat.KOHYA),
    "kohya of split weights": (
        DIFFUSERS,
        lambda module: f"lora_unet_{flat(module)}",
        "kohya",
        LoraFormat.KOHYA,
    ),
    "kohya with a last underscore": (
        DIFFUSERS,
        lambda module: f"lora_unet_{flat(module)}_",
        "kohya",
        LoraFormat.KOHYA,
    ),
    "onetrainer": (
        DIFFUSERS,
        lambda module: f"lora_transformer_{flat(module)}",
        "kohya",
        LoraFormat.ONETRAINER,
    ),
    "onetrainer omi": (OMI, lambda module: f"transformer.{module}", "kohya", LoraFormat.ONETRAINER),
    "lycoris": (DIFFUSERS, lambda module: f"lycoris_{flat(module)}", "kohya", LoraFormat.LYCORIS),
    "diffusers": (DIFFUSERS, lambda module: f"transformer.{module}", "peft", LoraFormat.DIFFUSERS),
    "diffusers without prefix": (DIFFUSERS, str, "peft", LoraFormat.DIFFUSERS),
    "diffusers with kohya ends": (
        DIFFUSERS,
        lambda module: f"transformer.{module}",
        "kohya",
        LoraFormat.DIFFUSERS,
    ),
    "peft": (DIFFUSERS, lambda module: f"base_model.model.{module}", "adapter", LoraFormat.DIFFUSERS),
    "simpletuner": (DIFFUSERS, lambda m: f"transformer.base_model.model.{m}", "peft", LoraFormat.DIFFUSERS),
    "bfl": (BFL, str, "peft", LoraFormat.BFL),
    "comfyui": (BFL, lambda module: f"diffusion_model.{module}", "peft", LoraFormat.BFL),
    "comfyui with kohya ends": (BFL, lambda module: f"diffusion_model.{module}", "kohya", LoraFormat.BFL),
    "fal": (BFL, lambda module: f"base_model.model.{module}", "peft", LoraFormat.BFL),
    "xlabs": (XLABS, str, "xlabs", LoraFormat.XLABS),
    "xlabs with prefix": (XLABS, lambda module: f"diffusion_model.{module}", "xlabs", LoraFormat.XLABS),
}


def ended(ends: str, module: str, down: Tensor, up: Tensor, alpha: float) -> tuple[dict[str, Tensor], float]:
    """The keys of one module and the scale that they mean."""
    if ends == "kohya":
        return kohya(module, down, up, alpha), alpha / down.shape[0]
    if ends == "xlabs":
        return {f"{module}.down.weight": down, f"{module}.up.weight": up}, 1.0
    return peft(module, down, up, "default" if ends == "adapter" else ""), 1.0


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_module_of_every_naming_changes_its_own_rows(naming: str) -> None:
    modules, write, ends, expected_format = NAMINGS[naming]
    tensors, expected = {}, {}
    for index, (module, (target, rows)) in enumerate(modules.items()):
        weight = f"{target}.weight"
        # Another rank and alpha for each layer: nothing may be taken from a neighbour.
        down, up = factors(tuple(BASE[weight][rows].shape), 1 + index % 4, seed=index)
        keys, scale = ended(ends, write(module), down, up, alpha=0.5 + index)
        tensors |= keys
        expected.setdefault(weight, BASE[weight].clone())[rows] += -0.6 * scale * (up @ down)
    read = read_keys(tensors, SHAPES)
    assert (read.format, len(read.patches), read.text_encoder_keys) == (expected_format, len(modules), 0)
    assert_weights(merge(tensors, -0.6), expected)


@pytest.mark.parametrize("module", ["transformer.norm_out.linear", "lora_transformer_norm_out_linear"])
def test_the_final_modulation_of_diffusers_has_its_halves_exchanged(module: str) -> None:
    name = "final_layer.adaLN_modulation.1.weight"
    down, up = factors(SHAPES[name], 2, seed=3)
    delta = up @ down
    expected = BASE[name] + torch.cat([delta[HIDDEN:], delta[:HIDDEN]])
    assert_weights(merge(kohya(module, down, up)), {name: expected})


def test_the_final_modulation_of_bfl_keeps_its_order() -> None:
    name = "final_layer.adaLN_modulation.1.weight"
    down, up = factors(SHAPES[name], 2, seed=3)
    assert_weights(merge(kohya("lora_unet_final_layer_adaLN_modulation_1", down, up)), {name: BASE[name] + up @ down})


def diffusers_model() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=IN_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=HIDDEN // HEAD,
        joint_attention_dim=TEXT,
        pooled_projection_dim=VECTOR,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def bfl_weights(model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """The linears of a diffusers model as BFL's fused weights."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    parts: dict[str, dict[int, Tensor]] = {}
    for module, (target, rows) in {**DIFFUSERS, **twin_blocks()}.items():
        for end in ("weight", "bias"):
            parts.setdefault(f"{target}.{end}", {})[rows.start or 0] = state[f"{module}.{end}"]
    fused = {name: torch.cat([pieces[start] for start in sorted(pieces)]) for name, pieces in parts.items()}
    for end in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        fused[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    return fused


def twin_blocks() -> dict[str, tuple[str, slice]]:
    """`DIFFUSERS` for block 0 and 1 alike."""
    twins = {}
    for module, (target, rows) in DIFFUSERS.items():
        for index in "01":
            other = [
                ".".join(index if part in "01" and at == 1 else part for at, part in enumerate(n.split(".")))
                for n in (module, target)
            ]
            twins[other[0]] = (other[1], rows)
    return twins


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_equals_the_weights_that_diffusers_fuses(dora: bool) -> None:
    model = diffusers_model()
    base = bfl_weights(model)
    shapes = {name: tuple(weight.shape) for name, weight in base.items()}
    assert shapes.items() <= SHAPES.items()
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tensors = {}
    for seed, (name, module) in enumerate(modules.items()):
        tensors |= peft(f"transformer.{name}", *factors(tuple(module.weight.shape), 1 + seed % 3, seed))
        if dora:
            magnitude = random_tensor(module.out_features, seed=seed).abs() + 0.5
            tensors[f"transformer.{name}.lora_magnitude_vector"] = magnitude
    merged_here = dict(base)
    for patch in read_keys(tensors, shapes).patches:
        merged_here[patch.weight] = merged(merged_here[patch.weight], [(patch, 1.0)])
    loadable = {f"{key}.weight" if key.endswith("_vector") else key: value for key, value in tensors.items()}
    model.load_lora_adapter(loadable, prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    fused = bfl_weights(model)
    for name, weight in fused.items():
        torch.testing.assert_close(merged_here[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if name.endswith(".weight"):
            assert (weight - base[name]).norm() > 0.1


TEXT_KEYS = [
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q.alpha",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
    "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
    "t5.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight",
    "bundle_emb.my_cat.clip_l",
]


def test_text_encoder_keys_are_counted_and_no_error() -> None:
    tensors = dict.fromkeys(TEXT_KEYS, torch.ones(2, 2))
    alone = read_keys(tensors, SHAPES)
    assert (alone.patches, alone.format, alone.text_encoder_keys) == (
        (),
        LoraFormat.TEXT_ENCODER,
        len(TEXT_KEYS),
    )
    both = read_keys(tensors | kohya(f"lora_unet_{flat(PROJ)}", *factors((HIDDEN, HIDDEN), 2, 1)), SHAPES)
    assert (len(both.patches), both.format, both.text_encoder_keys) == (1, LoraFormat.KOHYA, len(TEXT_KEYS))


def test_a_layer_that_a_file_holds_twice_counts_once() -> None:
    down, up = factors((HIDDEN, HIDDEN), 2, 1)
    twice = kohya(f"lora_unet_{flat(PROJ)}", down, up) | kohya(f"diffusion_model.{PROJ}", down.clone(), up.clone())
    assert_weights(merge(twice), {f"{PROJ}.weight": BASE[f"{PROJ}.weight"] + up @ down})


def test_flat_names_are_as_unambiguous_as_dotted_ones() -> None:
    table = TargetTable.of(tiny_shapes(double=12, single=12))
    assert len(table.flat) == len(table.dotted)


def test_every_weight_of_the_architecture_can_be_reached_by_its_own_name() -> None:
    table = TargetTable.of(SHAPES)
    for name in SHAPES:
        found = table.find(f"diffusion_model.{name.rpartition('.')[0]}")
        assert found is not None
        assert found[0].rows is None
        assert found[0].module == name.rpartition(".")[0]


def test_tensors_are_taken_as_they_are() -> None:
    tensors = kohya(f"lora_unet_{flat(QKV)}", *(t.half() for t in factors((3 * HIDDEN, HIDDEN), 2, 1)))
    (patch,) = read_keys(tensors, SHAPES).patches
    assert patch.change.down is tensors[f"lora_unet_{flat(QKV)}.lora_down.weight"]
    assert patch.change.up is tensors[f"lora_unet_{flat(QKV)}.lora_up.weight"]
