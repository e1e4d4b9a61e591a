"""FLUX.1's blocks as pure functions of tensors: activations and weights in, activations out.

Each function can be compiled by TensorRT or Inductor or run as it is; all have the same signature. Architecture:
https://github.com/black-forest-labs/flux (src/flux/modules/layers.py). Modulations are inputs, because they depend only
on timestep, guidance and pooled text: `modulation_table` and `stem.Modulations` compute them beside the blocks.

Shapes: img [B, n_img, hidden], txt [B, n_txt, hidden], x [B, n_txt + n_img, hidden], text first; q, k, v [B, L, H, D];
a modulation is [6, B, hidden] (shift, scale, gate for attention, then for the MLP) or [3, B, hidden] (single block).
A `Weight` is a matrix [out, in] in the model's dtype, or an FP8 matrix with its scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fp8_attention import QkvStream, ValueSource, attend_fp8, attend_qkv
from .fused import gated_norm, gelu_product, has_gelu_epilogue, joined_product, joint_product, norm_rope_qk
from .linear import (
    Activation,
    Fp8Weight,
    Weight,
    gated_norm_linear,
    gelu_linear,
    join_gelu_linear,
    linear,
    norm_linear,
)
from .open_sum import OpenSum

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, L, H, D], to [B, L, H * D]."""
BesideAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""(q, k, v, x, weight, bias) to attention's output and `fused.gelu_product` of x: of several pictures both are at work
at once. One tensor where they lie side by side."""


def double_qkv(
    img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor,
    img_cos: Tensor, img_sin: Tensor, txt_cos: Tensor, txt_sin: Tensor,
    img_qkv: Weight, img_qkv_bias: Tensor, img_query_norm: Tensor, img_key_norm: Tensor,
    txt_qkv: Weight, txt_qkv_bias: Tensor, txt_query_norm: Tensor, txt_key_norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v [B, n_txt + n_img, H, D] of a double block, normalised and rotated."""
    img_out = norm_linear(img, img_mod[0], img_mod[1], img_qkv, img_qkv_bias)
    txt_out = norm_linear(txt, txt_mod[0], txt_mod[1], txt_qkv, txt_qkv_bias)
    return _joint_qkv(
        QkvStream(img_out, img_query_norm, img_key_norm, img_cos, img_sin),
        QkvStream(txt_out, txt_query_norm, txt_key_norm, txt_cos, txt_sin),
    )


def double_out(
    img: Tensor, txt: Tensor, img_attn: Activation, txt_attn: Activation, img_mod: Tensor, txt_mod: Tensor,
    *weights: Weight,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """img and txt after a double block; `img_attn` and `txt_attn` [B, n, hidden] are attention's output.

    `weights`: proj, mlp.0, mlp.2, each with its bias, of the image, then of the text.
    """
    img_sum = _after_attention(img, img_attn, img_mod, *weights[:6])
    txt_sum = _after_attention(txt, txt_attn, txt_mod, *weights[6:])
    return img_sum.closed(), txt_sum.closed()


def single_qkv_mlp(
    x: Tensor, mod: Tensor, cos: Tensor, sin: Tensor,
    linear1: Weight, linear1_bias: Tensor, query_norm: Tensor, key_norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [B, L, H, D], normalised and rotated, and `wide` [B, L, 3 * hidden + mlp_hidden], linear1's whole output.

    v and the MLP's input are views of `wide` (`value_of`, `mlp_of`), so nothing is copied between the segments.
    """
    wide = norm_linear(x, mod[0], mod[1], linear1, linear1_bias)
    return *_rotated(QkvStream(wide, query_norm, key_norm, cos, sin), x.shape[-1]), wide


def single_out(
    x: Tensor, attn: Activation, wide: Tensor, mod: Tensor, linear2: Weight, linear2_bias: Tensor
) -> tuple[Tensor]:
    """x after a single block; `attn` [B, L, hidden], `wide` as `single_qkv_mlp` returned it."""
    out = join_gelu_linear(attn, mlp_of(wide, x.shape[-1]), linear2, linear2_bias)
    return (OpenSum(x, out, mod[2]).closed(),)


def double_block(attention: AttentionFunction) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A whole double block with `attention` inside, from open sums to open sums.

    A stream comes as x, what is to be added to it, and that addition's gate. It is returned as x and what its last
    gate, `mod[5]`, multiplies: img, img_add, txt, txt_add.
    """

    def block(
        img: Tensor, img_add: Tensor, img_gate: Tensor, txt: Tensor, txt_add: Tensor, txt_gate: Tensor,
        img_mod: Tensor, txt_mod: Tensor,
        img_cos: Tensor, img_sin: Tensor, txt_cos: Tensor, txt_sin: Tensor, *weights: Weight,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        img_qkv, img_bias, img_query, img_key, txt_qkv, txt_bias, txt_query, txt_key = weights[:8]
        img_stream, txt_stream = OpenSum(img, img_add, img_gate), OpenSum(txt, txt_add, txt_gate)
        if _written_together(img, attention, img_qkv, txt_qkv):
            img, img_normed = gated_norm(img_stream, img_mod[0], img_mod[1])
            txt, txt_normed = gated_norm(txt_stream, txt_mod[0], txt_mod[1])
            joint = joint_product(img_normed, txt_normed, (img_qkv, img_bias), (txt_qkv, txt_bias))
            txt_out, img_out = joint.split((txt.shape[1], img.shape[1]), 1)
        else:
            joint = None
            img, img_out = gated_norm_linear(img_stream, img_mod[0], img_mod[1], img_qkv, img_bias)
            txt, txt_out = gated_norm_linear(txt_stream, txt_mod[0], txt_mod[1], txt_qkv, txt_bias)
        img_attn, txt_attn = _joint_attention(
            attention,
            QkvStream(img_out, img_query, img_key, img_cos, img_sin, _value_source(img_mod, img_qkv, img_bias)),
            QkvStream(txt_out, txt_query, txt_key, txt_cos, txt_sin, _value_source(txt_mod, txt_qkv, txt_bias)),
            joint,
        )
        img_sum = _after_attention(img, img_attn, img_mod, *weights[8:14])
        txt_sum = _after_attention(txt, txt_attn, txt_mod, *weights[14:])
        return img_sum.x, img_sum.add, txt_sum.x, txt_sum.add

    return block


def single_block(
    attention: AttentionFunction, beside: BesideAttention | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A whole single block with `attention` inside, from open sum to open sum: x, and what its gate multiplies.

    `beside`: the same attention with a product beside it.
    """

    def block(
        x: Tensor, add: Tensor, gate: Tensor, mod: Tensor, cos: Tensor, sin: Tensor,
        linear1: Weight, linear1_bias: Tensor, query_norm: Tensor, key_norm: Tensor,
        linear2: Weight, linear2_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        stream = OpenSum(x, add, gate)
        if (
            _is_cut(x, beside) and attention is not attend_fp8
            and isinstance(linear1, Tensor) and isinstance(linear2, Tensor)
        ):  # fmt: skip
            x, normed = gated_norm(stream, mod[0], mod[1])
            weights = (linear1, linear1_bias, query_norm, key_norm, linear2, linear2_bias)
            return x, _cut_single_block(attention, beside, normed, cos, sin, *weights)
        x, wide = gated_norm_linear(stream, mod[0], mod[1], linear1, linear1_bias)
        source = _value_source(mod, linear1, linear1_bias)
        attn = _attention(attention, QkvStream(wide, query_norm, key_norm, cos, sin, source), x.shape[-1])
        return x, join_gelu_linear(attn, mlp_of(wide, x.shape[-1]), linear2, linear2_bias)

    return block


def _is_cut(x: Tensor, beside: BesideAttention | None) -> bool:
    """Whether plain linear layers are cut between attention and MLP. Inductor compiles for one picture and for several
    anyway; measured on an H100 for one and for two (`fused`, `attention._BESIDE`)."""
    return has_gelu_epilogue(x) and (x.shape[0] == 1 or beside is not None)


def _cut_single_block(
    attention: AttentionFunction, beside: BesideAttention | None, normed: Tensor, cos: Tensor, sin: Tensor,
    linear1: Tensor, linear1_bias: Tensor, query_norm: Tensor, key_norm: Tensor, linear2: Tensor, linear2_bias: Tensor,
) -> Tensor:  # fmt: skip
    """A single block with both linear layers cut between attention and MLP, so that a product applies the GELU."""
    hidden = normed.shape[-1]
    qkv = linear(normed, linear1[: 3 * hidden], linear1_bias[: 3 * hidden])
    mlp = (normed, linear1[3 * hidden :], linear1_bias[3 * hidden :])
    stream = QkvStream(qkv, query_norm, key_norm, cos, sin)
    if beside is None:
        made = _attention(attention, stream, hidden), gelu_product(*mlp)
    else:
        q, k = _rotated(stream, hidden)
        made = beside(q, k, value_of(qkv, q), *mlp)
    if isinstance(made, Tensor):
        return linear(made, linear2, linear2_bias)
    return joined_product(*made, linear2, linear2_bias)


def _joint_qkv(img: QkvStream, txt: QkvStream) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of both streams, text first, normalised and rotated."""
    q, k = _normed_qk(img, txt)
    values = [split_heads(stream.qkv, stream.query_norm.shape[0])[2] for stream in (txt, img)]
    return q, k, torch.cat(values, 1)


def _joint_attention(
    attention: AttentionFunction, img: QkvStream, txt: QkvStream, joint: Tensor | None
) -> tuple[Activation, Activation]:
    """Attention's output for img and txt. In E4M3, q, k, v are rounded to it where they are made and joined.

    `joint`: both streams' products where they lie one after the other already.
    """
    n_txt, heads = txt.qkv.shape[1], img.qkv.shape[-1] // (3 * img.query_norm.shape[0])
    if attention is attend_fp8:
        quantized = attend_qkv(img, txt, heads)
        return quantized.tokens(n_txt, None), quantized.tokens(0, n_txt)
    if joint is None:
        attn = attention(*_joint_qkv(img, txt))
    else:
        q, k = _normed_qk(img, txt)
        attn = attention(q, k, value_of(joint, q))
    return attn[:, n_txt:], attn[:, :n_txt]


def _value_source(mod: Tensor, weight: Weight, bias: Tensor) -> ValueSource:
    """Of the third of q, k and v, whose product begins with theirs."""
    hidden = mod.shape[-1]
    rows = slice(2 * hidden, 3 * hidden)
    matrix, scale = (weight.weight, weight.scale) if isinstance(weight, Fp8Weight) else (weight, None)
    if scale is not None and scale.numel() > 1:
        scale = scale[rows]
    return ValueSource(mod[0], mod[1], matrix[rows], scale, bias[rows])


def _written_together(x: Tensor, attention: AttentionFunction, *weights: Weight) -> bool:
    """Whether both streams' products are written into one tensor, so that v is not copied there (`joint_product`)."""
    plain = all(isinstance(weight, Tensor) for weight in weights)
    return x.shape[0] == 1 and has_gelu_epilogue(x) and attention is not attend_fp8 and plain


def _attention(attention: AttentionFunction, stream: QkvStream, hidden: int) -> Activation:
    """Attention's output for the one stream of a single block."""
    if attention is attend_fp8:
        return attend_qkv(stream, None, hidden // stream.query_norm.shape[0])
    q, k = _rotated(stream, hidden)
    return attention(q, k, value_of(stream.qkv, q))


def _rotated(stream: QkvStream, hidden: int) -> tuple[Tensor, Tensor]:
    norms, pe = (stream.query_norm, stream.key_norm), (stream.cos, stream.sin)
    return norm_rope_qk(stream.qkv[..., : 3 * hidden], None, norms, norms, pe, pe)


def _normed_qk(img: QkvStream, txt: QkvStream) -> tuple[Tensor, Tensor]:
    return norm_rope_qk(
        img.qkv, txt.qkv, (img.query_norm, img.key_norm), (txt.query_norm, txt.key_norm),
        (img.cos, img.sin), (txt.cos, txt.sin),
    )  # fmt: skip


def _after_attention(
    x: Tensor, attn: Activation, mod: Tensor,
    proj: Weight, proj_bias: Tensor, mlp_0: Weight, mlp_0_bias: Tensor, mlp_2: Weight, mlp_2_bias: Tensor,
) -> OpenSum:  # fmt: skip
    """One stream of a double block after attention, its last addition open."""
    stream = OpenSum(x, linear(attn, proj, proj_bias), mod[2])
    if has_gelu_epilogue(x) and isinstance(mlp_0, Tensor) and isinstance(mlp_2, Tensor):
        x, normed = gated_norm(stream, mod[3], mod[4])
        return OpenSum(x, linear(gelu_product(normed, mlp_0, mlp_0_bias), mlp_2, mlp_2_bias), mod[5])
    x, inner = gated_norm_linear(stream, mod[3], mod[4], mlp_0, mlp_0_bias)
    return OpenSum(x, gelu_linear(inner, mlp_2, mlp_2_bias), mod[5])


def value_of(wide: Tensor, q: Tensor) -> Tensor:
    """v [B, L, H, D], a view of `wide`; `q` gives the head shape."""
    hidden = q.shape[-2] * q.shape[-1]
    return wide[..., 2 * hidden : 3 * hidden].unflatten(-1, (q.shape[-2], q.shape[-1]))


def mlp_of(wide: Tensor, hidden: int) -> Tensor:
    return wide[..., 3 * hidden :]


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused [B, L, 3 * hidden] as q, k, v [B, L, H, D]: q's rows first, then k's, then v's."""
    q, k, v = qkv.chunk(3, dim=-1)
    return q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim)), v.unflatten(-1, (-1, head_dim))
