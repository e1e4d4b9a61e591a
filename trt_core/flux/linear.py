"""A block's linear layers in the precision of their weights, together with what is computed just before them.

An FP8 product needs its input in FP8. Quantizing it by itself would read and write the activation once more, so the
layer norm, the GELU and the join before a product are part of these functions and are fused with it (`fp8`, `fused`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8, fp8_export
from .fused import join_gelu, modulated_norm


class Fp8Weight(NamedTuple):
    """An E4M3 matrix [out, in], its fp32 scale ([out, 1], or one element), and the input's scale where it is static."""

    weight: Tensor
    scale: Tensor
    input_scale: Tensor | None


Weight = Tensor | Fp8Weight
_quantizes = True


@contextmanager
def unquantized_inputs() -> Iterator[None]:
    """While inside, FP8 layers take their inputs as they are and multiply in the inputs' dtype: the exact reference."""
    global _quantizes
    _quantizes = False
    try:
        yield
    finally:
        _quantizes = True


def linear(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """x [..., in] @ weight^T + bias."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if not _quantizes:
        return _exact(x, weight, bias)
    return _product(fp8.quantize(x, weight.input_scale), weight, bias, x.dtype)


def norm_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """`linear` of the modulated layer norm of x [B, L, hidden]; shift, scale [B, hidden]."""
    if isinstance(weight, Tensor) or not _quantizes:
        return linear(modulated_norm(x, shift, scale), weight, bias)
    return _product(fp8.quantize_norm(x, shift, scale, weight.input_scale), weight, bias, x.dtype)


def gelu_linear(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """`linear` of gelu(x)."""
    if isinstance(weight, Tensor) or not _quantizes:
        return linear(F.gelu(x, approximate="tanh"), weight, bias)
    return _product(fp8.quantize_gelu(x, weight.input_scale), weight, bias, x.dtype)


def join_gelu_linear(attn: Tensor, mlp: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """`linear` of attn and gelu(mlp) joined along the last axis."""
    if isinstance(weight, Tensor) or not _quantizes:
        return linear(join_gelu(attn, mlp), weight, bias)
    return _product(fp8.quantize_join_gelu(attn, mlp, weight.input_scale), weight, bias, attn.dtype)


def _product(quantized: tuple[Tensor, Tensor], weight: Fp8Weight, bias: Tensor, dtype: torch.dtype) -> Tensor:
    product = fp8_export.scaled_linear if fp8_export.exporting() else fp8.scaled_linear
    return product(*quantized, weight.weight, weight.scale, bias, dtype)


def _exact(x: Tensor, weight: Fp8Weight, bias: Tensor) -> Tensor:
    return F.linear(x, fp8.dequantize(weight.weight, weight.scale, x.dtype), bias.to(x.dtype))
