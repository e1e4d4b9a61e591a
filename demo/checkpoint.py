"""A tiny random FLUX pipeline and LoRA files for it, written as safetensors with nothing downloaded.

The architecture is FLUX's at small numbers. The weights are random, so the pictures are abstract; they are
scaled so that every gate, modulation and norm matters and a mistake in any of them changes the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .vocabulary import CLIP_TOKENS, write_clip_tokenizer, write_t5_tokenizer

DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 3
HEADS, HEAD_DIM = 4, 32
WIDTH = HEADS * HEAD_DIM
TEXT_WIDTH = POOLED_WIDTH = 64
TEXT_TOKENS = 64
LORA_RANK, LORA_ALPHA = 8, 4.0
VELOCITY_GAIN = 3.0
"""How far the model outweighs the noise a picture starts from; at 1 all pictures of a seed look alike."""


def write_tiny_pipeline(folder: Path | str, seed: int = 0) -> Path:
    """The folder of a pipeline that `FluxPipeline.from_pretrained` loads; 5 MB, equal for equal seeds."""
    folder = Path(folder)
    with _seeded(seed):
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_clip(write_clip_tokenizer(folder / "tokenizer")),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder_2=_t5(write_t5_tokenizer(folder / "tokenizer_2", TEXT_TOKENS)),
            tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
            transformer=_transformer(),
        )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def write_tiny_loras(folder: Path | str, seed: int = 0) -> list[Path]:
    """Two LoRA files for the tiny pipeline: `a.safetensors` in diffusers' format, `b.safetensors` in kohya's.

    Both are strong enough to change the picture visibly. A touches attention and MLPs of every block, B the
    fused `qkv`, modulations and output projections, with alpha.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for offset, (path, make) in enumerate(zip(paths, (_diffusers_lora, _kohya_lora), strict=True)):
        save_file(make(torch.Generator().manual_seed(seed + offset)), path)
    return paths


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from `seed` inside; the caller's state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in model.named_parameters():
        _fill(name, parameter)
    model.proj_out.weight.data.mul_(VELOCITY_GAIN)
    return model.to(torch.bfloat16)


@torch.no_grad()
def _fill(name: str, parameter: nn.Parameter) -> None:
    """Random values, in place. Norm gains well above 1 make attention selective, so that RoPE matters."""
    if parameter.ndim > 1:
        parameter.normal_(std=parameter.shape[1] ** -0.5)
    elif name.endswith("bias"):
        parameter.normal_(std=0.2)
    else:
        parameter.normal_(mean=2.0, std=0.4)


def _vae() -> AutoencoderKL:
    """Latents of 16 channels at 1/8 of the picture's size, as FLUX has them."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=128,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    _full_contrast(vae)
    return vae.to(torch.bfloat16)


@torch.no_grad()
def _full_contrast(vae: AutoencoderKL) -> None:
    """Scales the last convolution, in place, so that decoded noise fills the range of colours."""
    last = vae.decoder.conv_out
    last.bias.zero_()
    picture = vae.decode(VELOCITY_GAIN * torch.randn(1, 16, 16, 16) / vae.config.scaling_factor).sample
    last.weight.mul_(0.5 / picture.std())
    last.bias.sub_(picture.mean(dim=(0, 2, 3)) * (0.5 / picture.std()))


def _clip(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=POOLED_WIDTH,
        projection_dim=POOLED_WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        initializer_range=0.1,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config).to(torch.bfloat16)


def _t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).to(torch.bfloat16)


def _low_rank(out_width: int, in_width: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Down [rank, in] and up [out, rank], bf16; their product is about as large as a weight of the model."""
    down = torch.randn(LORA_RANK, in_width, generator=random) * in_width**-0.5
    up = torch.randn(out_width, LORA_RANK, generator=random) * LORA_RANK**-0.5
    return down.to(torch.bfloat16), up.to(torch.bfloat16)


def _diffusers_lora(random: torch.Generator) -> dict[str, Tensor]:
    layers = {}
    for block in (f"transformer_blocks.{index}" for index in range(DOUBLE_BLOCKS)):
        for layer in (
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
        ):
            layers[f"{block}.attn.{layer}"] = (WIDTH, WIDTH)
        for mlp in ("ff", "ff_context"):
            layers[f"{block}.{mlp}.net.0.proj"] = (4 * WIDTH, WIDTH)
            layers[f"{block}.{mlp}.net.2"] = (WIDTH, 4 * WIDTH)
    for block in (f"single_transformer_blocks.{index}" for index in range(SINGLE_BLOCKS)):
        for layer in ("attn.to_q", "attn.to_k", "attn.to_v"):
            layers[f"{block}.{layer}"] = (WIDTH, WIDTH)
        layers[f"{block}.proj_mlp"] = (4 * WIDTH, WIDTH)
        layers[f"{block}.proj_out"] = (WIDTH, 5 * WIDTH)
    tensors = {}
    for layer, shape in layers.items():
        down, up = _low_rank(*shape, random)
        tensors[f"transformer.{layer}.lora_A.weight"] = down
        tensors[f"transformer.{layer}.lora_B.weight"] = up
    return tensors


def _kohya_lora(random: torch.Generator) -> dict[str, Tensor]:
    """No `linear1`: diffusers splits it at FLUX.1-dev's widths only, so a tiny one cannot be loaded."""
    layers = {}
    for block in (f"double_blocks_{index}" for index in range(DOUBLE_BLOCKS)):
        for stream in ("img", "txt"):
            layers[f"{block}_{stream}_attn_qkv"] = (3 * WIDTH, WIDTH)
            layers[f"{block}_{stream}_attn_proj"] = (WIDTH, WIDTH)
            layers[f"{block}_{stream}_mod_lin"] = (6 * WIDTH, WIDTH)
    for block in (f"single_blocks_{index}" for index in range(SINGLE_BLOCKS)):
        layers[f"{block}_linear2"] = (WIDTH, 5 * WIDTH)
        layers[f"{block}_modulation_lin"] = (3 * WIDTH, WIDTH)
    tensors = {}
    for layer, shape in layers.items():
        down, up = _low_rank(*shape, random)
        tensors[f"lora_unet_{layer}.lora_down.weight"] = down
        tensors[f"lora_unet_{layer}.lora_up.weight"] = up
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(LORA_ALPHA)
    return tensors
