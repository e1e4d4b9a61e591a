"""Attention whose operands are E4M3: q, k, v and the probabilities, with fp32 sums, by cuDNN's kernel.

q and k leave their RMS norm with a known size (at most sqrt(D) times the largest norm weight), so they are rounded as
they are; probabilities are exp(logit - largest) <= 1, times 448. v has one scale. Were it v's largest magnitude / 448,
v would be read twice: to find that, and to be rounded. So a block's v is bounded before it is made (`ValueSource`):
E4M3 is as exact three orders of magnitude below its largest number. The result, averages of v's rows, may be far
smaller than they are; it has the scale that v's largest magnitude gives, and the next product takes it as it is.

Measured on an H100, 24 heads, 4608 tokens, D 128: 0.294 ms where bf16 takes 0.433.

What rounding does to a logit grows with the norms' weights, and sharp softmaxes make much of it: `logit_noise`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import cudnn_attention, fused, operators
from .fp8 import FP8, FP8_MAX, quantize_tensor, scale_of, tensor_scale
from .rope import rotate

ROUNDED_BY = 1 / 16
"""Largest relative error of a number rounded to E4M3."""
BOUND_MARGIN = 1.01
"""For the rounding of sums and of v itself; what is beyond it all the same becomes 448."""
_PRODUCT_ERROR = 0.0375
"""Relative rms error of a product of two numbers rounded to E4M3 (0.0265 each)."""


class ValueSource(NamedTuple):
    """What makes v = (norm(x) * (1 + scale) + shift) @ (weight * weight_scale)^T + bias: it says how large v can be.

    shift and scale [B, K]; weight [H * D, K], E4M3 with weight_scale (fp32, [H * D, 1] or one element), or of another
    dtype with None; bias [H * D].

    A layer norm's row n has a length of sqrt(K) at most, and (n_k * g_k + s_k)^2 <= (n_k^2 + 1) * (g_k^2 + s_k^2), so
    by Cauchy and Schwarz |v_j| <= sqrt(2 K) * |W_j * sqrt(g^2 + s^2)| + |bias_j| for g = 1 + scale, s = shift. Where
    the norm is rounded to E4M3, each element is off by a sixteenth of itself at most. Of several pictures the largest
    g_k^2 + s_k^2 counts. With rows in random directions the largest of v is about a seventeenth of that.
    """

    shift: Tensor
    scale: Tensor
    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor

    def bound(self) -> Tensor:
        """fp32 [1], at least the largest |v|."""
        weight = self.weight.float()
        if self.weight_scale is not None:
            weight = weight * self.weight_scale
        reach = ((1 + self.scale.float()).square() + self.shift.float().square()).amax(0)
        length = (weight.square() @ reach).sqrt() * input_length(weight.shape[-1])
        return (length + self.bias.float().abs()).amax().reshape(1) * BOUND_MARGIN


def input_length(width: int) -> float:
    """How long a modulated norm of `width` elements can be, in units of its modulation, rounded to E4M3."""
    return math.sqrt(2 * width) * (1 + ROUNDED_BY)


class QkvStream(NamedTuple):
    """One stream's product [B, n, 3 * H * D or more], q, k, v in its first columns, dense in the last axis; norms [D],
    angles [n, D / 2] in fp32; and what v is made of."""

    qkv: Tensor
    query_norm: Tensor
    key_norm: Tensor
    cos: Tensor
    sin: Tensor
    source: ValueSource | None = None


class QuantizedQkv(NamedTuple):
    """q, k, v [B, L, H, D] in E4M3, contiguous. `scale` (fp32 [1]): v's largest magnitude / 448, which the result of
    attention has. `factor` (fp32 [1]): v's own scale / `scale`, by which the result is multiplied before it is rounded.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    factor: Tensor


class Fp8Activation(NamedTuple):
    """An activation [..., K] that is E4M3 already, its scale (fp32, one element), and the dtype it stands for."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def tokens(self, start: int, stop: int | None) -> Fp8Activation:
        """Those of axis 1 from `start` to `stop`."""
        return Fp8Activation(self.values[:, start:stop], self.scale, self.dtype)

    def dequantized(self) -> Tensor:
        return (self.values.float() * self.scale).to(self.dtype)


def logit_noise(query_norm: Tensor, key_norm: Tensor) -> Tensor:
    """rms error of a logit (before softmax) when q and k are rounded to E4M3, from the norms' weights [..., D].

    A logit is sum(q_d * k_d) / sqrt(D) with q_d = g_d * z, z of unit rms: independent errors of 3.75 % of each term
    add up to 0.0375 * rms(g_q * g_k).
    """
    return (query_norm.float() * key_norm.float()).square().mean(-1).sqrt() * _PRODUCT_ERROR


def attend_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in E4M3 of q, k, v [B, L, H, D] in any float dtype to [B, L, H * D] in v's: between segments."""
    q8, k8 = (_rounded(x).contiguous() for x in (q, k))
    scale = tensor_scale(v)
    made = QuantizedQkv(q8, k8, quantize_tensor(v, scale).contiguous(), scale, torch.ones_like(scale))
    return _attended(made, v.dtype).dequantized()


def attend_qkv(img: QkvStream, txt: QkvStream | None, heads: int) -> Fp8Activation:
    """Attention over text and image tokens, [B, n_txt + n_img, H * D], from a block's products as they are."""
    return _attended(quantized_qkv(img, txt, heads), img.qkv.dtype)


def quantized_qkv(img: QkvStream, txt: QkvStream | None, heads: int) -> QuantizedQkv:
    """Of n_txt + n_img tokens, text first: q and k normalised and rotated, v in units of what bounds it."""
    kernels = fused.attention_kernels(img.qkv)
    if kernels is not None:
        return kernels.quantized_qkv(img, txt, heads, fused.EPS)
    streams = [stream for stream in (txt, img) if stream is not None]
    q, k, v = (torch.cat(part, dim=1) for part in zip(*(_split(stream, heads) for stream in streams), strict=True))
    scale, value_scale = tensor_scale(v), scale_of(torch.cat([_bound_of(stream) for stream in streams]).amax(0, True))
    return QuantizedQkv(_rounded(q), _rounded(k), quantize_tensor(v, value_scale), scale, value_scale / scale)


def _bound_of(stream: QkvStream) -> Tensor:
    if stream.source is None:
        raise ValueError("quantized_qkv needs to know what v is made of")
    return stream.source.bound()


def _split(stream: QkvStream, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k in fp32, normalised and rotated, and v as it is."""
    width = heads * stream.query_norm.shape[0]
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in stream.qkv[..., : 3 * width].split(width, -1))
    pe = (stream.cos, stream.sin)
    q, k = (fused.rms_norm(x.float(), norm.float()) for x, norm in ((q, stream.query_norm), (k, stream.key_norm)))
    return rotate(q, *pe), rotate(k, *pe), v


def _rounded(x: Tensor) -> Tensor:
    """x as E4M3 without a scale; what exceeds 448 becomes 448."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _attended(made: QuantizedQkv, dtype: torch.dtype) -> Fp8Activation:
    return Fp8Activation(_OPERATOR(made.q, made.k, made.v, made.factor).flatten(2), made.scale, dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """The same in plain PyTorch: probabilities are rounded before the product and not before their sum."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    rounded = (weights * FP8_MAX).to(FP8).float() / FP8_MAX
    out = (rounded @ v) / weights.sum(-1, keepdim=True) * factor
    return _rounded(out).transpose(1, 2).contiguous()


# attention(q, k, v, factor): E4M3 [B, L, H, D] of E4M3 operands of that shape, in units of v's scale / factor. An
# operator, because Dynamo cannot trace cuDNN's front end.
_OPERATOR = operators.define(
    __name__, "attention(Tensor q, Tensor k, Tensor v, Tensor factor) -> Tensor",
    cudnn_attention.attend, reference, lambda q, k, v, factor: torch.empty_like(v),
)  # fmt: skip
