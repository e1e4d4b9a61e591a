"""Matrices that are eight bits in memory alone and multiply unquantized inputs: modulations, read once per step.

Integers in groups of 128 columns, each group with an fp32 scale: `value = q * scale`, 1.03 bytes an element. E4M3 is as
small and rounds four times as coarsely (error of a Gaussian matrix: 0.0063 against 0.0265), and a rounded
modulation moves all tokens of all steps alike. Nothing averages it out: in plain PyTorch (hidden 512, 12 blocks)
20 Euler steps with E4M3 modulations end 0.0036 from fp32, with these 0.0019, with exact ones 0.0016.

Modulations that come in E4M3, from a checkpoint, are used as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8

GROUP = 128
"""Columns that share a scale: 24 groups in FLUX's rows of 3072. One outlier costs 128 weights their precision."""
INT8 = torch.int8
_LARGEST = 127.0


class AddedProduct(NamedTuple):
    """`up` [N, R] times `projected` [B, R] (fp32): what LoRAs add to a product, beside the stored matrix."""

    up: Tensor
    projected: Tensor


def groups(width: int) -> int:
    """How many scales a row of `width` columns has: one where GROUP does not divide it."""
    return width // GROUP if width % GROUP == 0 else 1


def quantize(value: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """`value` [N, K] as int8 [N, K] and fp32 scales [N, groups(K)], each group's largest element at 127.

    `out` is written in place and returned. A group that holds NaN or infinity stands for NaN.
    """
    rows, width = value.shape
    wide = value.float().view(rows, groups(width), -1)
    scale = fp8.scale_of(wide.abs().amax(-1, keepdim=True), _LARGEST)
    q = (wide / scale).round_().view(rows, width).to(INT8)
    if out is None:
        return q, scale.squeeze(-1)
    out[0].copy_(q)
    out[1].copy_(scale.squeeze(-1))
    return out


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that int8 or E4M3 with its scale stands for, rounded once to `dtype`."""
    if weight.dtype is not INT8:
        return fp8.dequantize(weight, scale, dtype)
    wide = weight.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
    return wide.flatten(-2).to(dtype)


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, added: AddedProduct | None = None
) -> Tensor:
    """x @ weight.T + bias + what LoRAs add, as [B, N] in x's dtype, summed in fp32, rounded once.

    x [B, K]; weight [N, K] is int8 or E4M3 with its scale (fp32, [N, groups(K)], [N, 1] or [1]), or a float with None.
    On a GPU `modulation_table` does the same for all layers at once, without a wide copy of the matrix.
    """
    if scale is None and added is None:
        return F.linear(x, weight, bias)
    wide = weight.float() if scale is None else dequantize(weight, scale, torch.float32)
    out = F.linear(x.float(), wide, None if bias is None else bias.float())
    return (out if added is None else out + F.linear(added.projected, added.up.float())).to(x.dtype)


def project(x: Tensor, down: Tensor) -> Tensor:
    """x @ down.T in fp32 [B, R]: `AddedProduct.projected`. x [B, K], down [R, K] in fp32."""
    return F.linear(x.float(), down)
