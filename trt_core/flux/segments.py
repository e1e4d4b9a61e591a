"""FLUX.1's blocks as pure functions of tensors: activations and weights in, activations out.

Each function can be compiled by TensorRT or Inductor or run as it is; all have the same signature. Architecture:
https://github.com/black-forest-labs/flux (src/flux/modules/layers.py). Modulations are inputs, because they depend only
on timestep, guidance and pooled text: `stem.Modulations` computes them beside the blocks.

Shapes: img [B, n_img, hidden], txt [B, n_txt, hidden], x [B, n_txt + n_img, hidden], text first; q, k, v [B, L, H, D];
a modulation is [6, B, hidden] (shift, scale, gate for attention, then for the MLP) or [3, B, hidden] (single block).
A `Weight` is a matrix [out, in] in the model's dtype, or an FP8 matrix with its scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fp8_attention import QkvStream, attend_fp8, attend_qkv
from .fused import gelu_product, has_gelu_epilogue, joined_product, joint_norm_rope, modulated_norm, norm_rope
from .linear import Activation, Weight, gelu_linear, join_gelu_linear, linear, norm_linear

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, L, H, D], to [B, L, H * D]."""


def double_qkv(
    img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor,
    img_cos: Tensor, img_sin: Tensor, txt_cos: Tensor, txt_sin: Tensor,
    img_qkv: Weight, img_qkv_bias: Tensor, img_query_norm: Tensor, img_key_norm: Tensor,
    txt_qkv: Weight, txt_qkv_bias: Tensor, txt_query_norm: Tensor, txt_key_norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v [B, n_txt + n_img, H, D] of a double block, normalised and rotated."""
    img_qkv_out = norm_linear(img, img_mod[0], img_mod[1], img_qkv, img_qkv_bias)
    txt_qkv_out = norm_linear(txt, txt_mod[0], txt_mod[1], txt_qkv, txt_qkv_bias)
    img_q, img_k, img_v = split_heads(img_qkv_out, img_query_norm.shape[0])
    txt_q, txt_k, txt_v = split_heads(txt_qkv_out, img_query_norm.shape[0])
    pe = (txt_cos, txt_sin, img_cos, img_sin)
    q = joint_norm_rope(txt_q, img_q, txt_query_norm, img_query_norm, *pe)
    k = joint_norm_rope(txt_k, img_k, txt_key_norm, img_key_norm, *pe)
    return q, k, torch.cat((txt_v, img_v), 1)


def double_out(
    img: Tensor, txt: Tensor, img_attn: Activation, txt_attn: Activation, img_mod: Tensor, txt_mod: Tensor,
    img_proj: Weight, img_proj_bias: Tensor, img_mlp_0: Weight, img_mlp_0_bias: Tensor, img_mlp_2: Weight,
    img_mlp_2_bias: Tensor,
    txt_proj: Weight, txt_proj_bias: Tensor, txt_mlp_0: Weight, txt_mlp_0_bias: Tensor, txt_mlp_2: Weight,
    txt_mlp_2_bias: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """img and txt after a double block; `img_attn` and `txt_attn` [B, n, hidden] are attention's output."""
    img = img + gate(img_mod[2]) * linear(img_attn, img_proj, img_proj_bias)
    txt = txt + gate(txt_mod[2]) * linear(txt_attn, txt_proj, txt_proj_bias)
    img = img + gate(img_mod[5]) * mlp(img, img_mod, img_mlp_0, img_mlp_0_bias, img_mlp_2, img_mlp_2_bias)
    txt = txt + gate(txt_mod[5]) * mlp(txt, txt_mod, txt_mlp_0, txt_mlp_0_bias, txt_mlp_2, txt_mlp_2_bias)
    return finite(img), finite(txt)


def single_qkv_mlp(
    x: Tensor, mod: Tensor, cos: Tensor, sin: Tensor,
    linear1: Weight, linear1_bias: Tensor, query_norm: Tensor, key_norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [B, L, H, D], normalised and rotated, and `wide` [B, L, 3 * hidden + mlp_hidden], linear1's whole output.

    v and the MLP's input are views of `wide` (`value_of`, `mlp_of`), so nothing is copied between the segments.
    """
    wide = norm_linear(x, mod[0], mod[1], linear1, linear1_bias)
    hidden = x.shape[-1]
    q, k, _ = split_heads(wide[..., : 3 * hidden], query_norm.shape[0])
    return norm_rope(q, query_norm, cos, sin), norm_rope(k, key_norm, cos, sin), wide


def single_out(
    x: Tensor, attn: Activation, wide: Tensor, mod: Tensor, linear2: Weight, linear2_bias: Tensor
) -> tuple[Tensor]:
    """x after a single block; `attn` [B, L, hidden], `wide` as `single_qkv_mlp` returned it."""
    out = join_gelu_linear(attn, mlp_of(wide, x.shape[-1]), linear2, linear2_bias)
    return (finite(x + gate(mod[2]) * out),)


def double_block(attention: AttentionFunction) -> Callable[..., tuple[Tensor, Tensor]]:
    """A whole double block with `attention` inside: `double_qkv`, attention, `double_out`."""
    if attention is attend_fp8:
        return _double_block_fp8_attention

    def block(
        img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor,
        img_cos: Tensor, img_sin: Tensor, txt_cos: Tensor, txt_sin: Tensor, *weights: Weight,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = double_qkv(img, txt, img_mod, txt_mod, img_cos, img_sin, txt_cos, txt_sin, *weights[:8])
        attn = attention(q, k, v)
        n_txt = txt.shape[1]
        return double_out(img, txt, attn[:, n_txt:], attn[:, :n_txt], img_mod, txt_mod, *weights[8:])

    return block


def single_block(attention: AttentionFunction) -> Callable[..., tuple[Tensor]]:
    """A whole single block with `attention` inside: `single_qkv_mlp`, attention, `single_out`."""
    if attention is attend_fp8:
        return _single_block_fp8_attention

    def block(x: Tensor, mod: Tensor, cos: Tensor, sin: Tensor, *weights: Weight) -> tuple[Tensor]:
        # Measured for one picture and two (`fused`); Inductor compiles for each of both anyway.
        if x.shape[0] == 1 and has_gelu_epilogue(x) and all(isinstance(weight, Tensor) for weight in weights):
            return _cut_single_block(attention, x, mod, cos, sin, *weights)
        q, k, wide = single_qkv_mlp(x, mod, cos, sin, *weights[:4])
        attn = attention(q, k, value_of(wide, q))
        return single_out(x, attn, wide, mod, *weights[4:])

    return block


def _cut_single_block(
    attention: AttentionFunction, x: Tensor, mod: Tensor, cos: Tensor, sin: Tensor,
    linear1: Tensor, linear1_bias: Tensor, query_norm: Tensor, key_norm: Tensor, linear2: Tensor, linear2_bias: Tensor,
) -> tuple[Tensor]:  # fmt: skip
    """`single_block` with both linear layers cut between attention and MLP, so that a product applies the GELU."""
    qkv_width = 3 * x.shape[-1]
    normed = modulated_norm(x, mod[0], mod[1])
    qkv = linear(normed, linear1[:qkv_width], linear1_bias[:qkv_width])
    q, k, v = split_heads(qkv, query_norm.shape[0])
    attn = attention(norm_rope(q, query_norm, cos, sin), norm_rope(k, key_norm, cos, sin), v)
    mlp_out = gelu_product(normed, linear1[qkv_width:], linear1_bias[qkv_width:])
    out = joined_product(attn, mlp_out, linear2, linear2_bias)
    return (finite(x + gate(mod[2]) * out),)


def _double_block_fp8_attention(
    img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor,
    img_cos: Tensor, img_sin: Tensor, txt_cos: Tensor, txt_sin: Tensor, *weights: Weight,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`double_block` with attention in E4M3: q, k, v are rounded to it where they are made, text and image joined."""
    img_qkv, img_bias, img_query, img_key, txt_qkv, txt_bias, txt_query, txt_key = weights[:8]
    img_out = norm_linear(img, img_mod[0], img_mod[1], img_qkv, img_bias)
    txt_out = norm_linear(txt, txt_mod[0], txt_mod[1], txt_qkv, txt_bias)
    attn = attend_qkv(
        QkvStream(img_out, img_query, img_key, img_cos, img_sin),
        QkvStream(txt_out, txt_query, txt_key, txt_cos, txt_sin),
        img.shape[-1] // img_query.shape[0],
    )
    n_txt = txt.shape[1]
    return double_out(img, txt, attn.tokens(n_txt, None), attn.tokens(0, n_txt), img_mod, txt_mod, *weights[8:])


def _single_block_fp8_attention(x: Tensor, mod: Tensor, cos: Tensor, sin: Tensor, *weights: Weight) -> tuple[Tensor]:
    """`single_block` with attention in E4M3."""
    linear1, bias, query_norm, key_norm = weights[:4]
    wide = norm_linear(x, mod[0], mod[1], linear1, bias)
    attn = attend_qkv(QkvStream(wide, query_norm, key_norm, cos, sin), None, x.shape[-1] // query_norm.shape[0])
    return single_out(x, attn, wide, mod, *weights[4:])


def value_of(wide: Tensor, q: Tensor) -> Tensor:
    """v [B, L, H, D], a view of `wide`; `q` gives the head shape."""
    hidden = q.shape[-2] * q.shape[-1]
    return wide[..., 2 * hidden : 3 * hidden].unflatten(-1, (q.shape[-2], q.shape[-1]))


def mlp_of(wide: Tensor, hidden: int) -> Tensor:
    return wide[..., 3 * hidden :]


def gate(value: Tensor) -> Tensor:
    return value[:, None, :]


def mlp(x: Tensor, mod: Tensor, weight_0: Weight, bias_0: Tensor, weight_2: Weight, bias_2: Tensor) -> Tensor:
    """The MLP of a double block's stream, its modulated layer norm included."""
    if has_gelu_epilogue(x) and isinstance(weight_0, Tensor) and isinstance(weight_2, Tensor):
        return linear(gelu_product(modulated_norm(x, mod[3], mod[4]), weight_0, bias_0), weight_2, bias_2)
    return gelu_linear(norm_linear(x, mod[3], mod[4], weight_0, bias_0), weight_2, bias_2)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused [B, L, 3 * hidden] as q, k, v [B, L, H, D]: q's rows first, then k's, then v's."""
    q, k, v = qkv.chunk(3, dim=-1)
    return q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim)), v.unflatten(-1, (-1, head_dim))


def finite(x: Tensor) -> Tensor:
    """fp16 overflows in FLUX's last double blocks (a known trait of the weights); other dtypes pass unchanged."""
    return x.clamp(-65504, 65504) if x.dtype is torch.float16 else x
