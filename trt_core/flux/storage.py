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

from . import fp8, fused

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
    For eager calls with few rows, such as modulations: on a GPU, up to 8 rows are one Triton kernel that reads the
    weight once (all of FLUX.1-dev's: 1.8 ms on an H100). Plain weights are cuBLAS's (in bf16: 2.8 ms).
    """
    if scale is None and added is None:
        return F.linear(x, weight, bias)
    kernels = fused.weight_kernels(weight)
    if kernels is not None and x.shape[0] <= kernels.MAX_BATCH:
        return kernels.rows_linear(x, weight, scale, bias, added)
    wide = weight.float() if scale is None else dequantize(weight, scale, torch.float32)
    out = F.linear(x.float(), wide, None if bias is None else bias.float())
    return (out if added is None else out + F.linear(added.projected, added.up.float())).to(x.dtype)


def project(x: Tensor, down: Tensor) -> Tensor:
    """x @ down.T in fp32 [B, R]: `AddedProduct.projected`. x [B, K], down [R, K] in fp32."""
    kernels = fused.weight_kernels(down)
    if kernels is not None and x.shape[0] <= kernels.MAX_BATCH:
        return kernels.rows_linear(x, down, None, None, None, torch.float32)
    return F.linear(x.float(), down)


def prepare(width: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles what the first LoRA beside matrices of `width` columns needs: without it, that one waited 0.5 s on an
    H100. Nothing on a CPU."""
    if device.type != "cuda":
        return
    x, bias = torch.zeros((batch, width), dtype=dtype, device=device), torch.zeros(16, dtype=dtype, device=device)
    weight, scale = quantize(torch.zeros((16, width), device=device))
    added = AddedProduct(bias.new_zeros((16, 16)), project(x, torch.zeros((16, width), device=device)))
    linear(x, weight, scale, bias, added)
