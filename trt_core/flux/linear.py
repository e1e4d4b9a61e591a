"""A block's linear layers in the precision of their weights, together with what is computed just before them.

An FP8 product needs its input in FP8. Quantizing it by itself would read and write the activation once more, so the
layer norm, the GELU and the join before a product are part of these functions and are fused with it (`fp8`, `fused`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8, fp8_export
from .fp8_attention import Fp8Activation
from .fused import gated_norm, join_gelu, modulated_norm, plain_product
from .open_sum import OpenSum


class Fp8Weight(NamedTuple):
    """An E4M3 matrix [out, in], its fp32 scale ([out, 1], or one element), and the input's scale where it is static.

    `wide`: the matrix is widened at each call and multiplied in the inputs' dtype, which are not quantized then.
    """

    weight: Tensor
    scale: Tensor
    input_scale: Tensor | None
    wide: bool = False


Weight = Tensor | Fp8Weight
Note = Callable[[Tensor, Fp8Weight], None]
_NOTED_TOKENS = 512
_quantizes = True
_note: Note | None = None


@contextmanager
def unquantized_inputs() -> Iterator[None]:
    """While inside, FP8 layers take their inputs as they are and multiply in the inputs' dtype: the exact reference."""
    global _quantizes
    _quantizes = False
    try:
        yield
    finally:
        _quantizes = True


@contextmanager
def noting_inputs(note: Note) -> Iterator[None]:
    """While inside, `note` gets each input of an FP8 layer with a static scale as it is before it is quantized.

    For eager calls. Results are what they are outside.
    """
    global _note
    _note = note
    try:
        yield
    finally:
        _note = None


Activation = Tensor | Fp8Activation
"""What attention hands over: a tensor, or one that is in E4M3 already."""


def linear(x: Activation, weight: Weight, bias: Tensor) -> Tensor:
    """x [..., in] @ weight^T + bias."""
    if isinstance(x, Fp8Activation):
        return _quantized_linear(x, weight, bias)
    if isinstance(weight, Tensor):
        return plain_product(x, weight, bias)
    if weight.wide or not _quantizes:
        return _exact(x, weight, bias)
    if _note is not None and weight.input_scale is not None:
        _note(x, weight)
        return _product(_quantized_in_parts(x, weight.input_scale), weight, bias, x.dtype)
    return _product(fp8.quantize(x, weight.input_scale), weight, bias, x.dtype)


def norm_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """`linear` of the modulated layer norm of x [B, L, hidden]; shift, scale [B, hidden]."""
    if isinstance(weight, Tensor) or _needs_inputs(weight):
        return linear(modulated_norm(x, shift, scale), weight, bias)
    return _product(fp8.quantize_norm(x, shift, scale, weight.input_scale), weight, bias, x.dtype)


def gated_norm_linear(
    stream: OpenSum, shift: Tensor, scale: Tensor, weight: Weight, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The stream added up [B, L, hidden], and its `norm_linear`."""
    if isinstance(weight, Tensor) or _needs_inputs(weight):
        x, normed = gated_norm(stream, shift, scale)
        return x, linear(normed, weight, bias)
    x, quantized = fp8.quantize_gated_norm(stream, shift, scale, weight.input_scale)
    return x, _product(quantized, weight, bias, x.dtype)


def gelu_linear(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """`linear` of gelu(x)."""
    if isinstance(weight, Tensor) or _needs_inputs(weight):
        return linear(F.gelu(x, approximate="tanh"), weight, bias)
    return _product(fp8.quantize_gelu(x, weight.input_scale), weight, bias, x.dtype)


def join_gelu_linear(attn: Activation, mlp: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """`linear` of attn and gelu(mlp) joined along the last axis."""
    if isinstance(weight, Tensor) or _needs_inputs(weight):
        wide = attn.dequantized() if isinstance(attn, Fp8Activation) else attn
        return linear(join_gelu(wide, mlp), weight, bias)
    values, scale = (attn.values, attn.scale) if isinstance(attn, Fp8Activation) else (attn, None)
    return _product(fp8.quantize_join_gelu(values, mlp, weight.input_scale, scale), weight, bias, mlp.dtype)


def _quantized_linear(x: Fp8Activation, weight: Weight, bias: Tensor) -> Tensor:
    """`linear` of what is in E4M3 already: it goes into an FP8 product as it is, whatever scale calibration found."""
    if isinstance(weight, Tensor):
        return F.linear(x.dequantized(), weight, bias)
    if _needs_inputs(weight):
        return linear(x.dequantized(), weight, bias)
    return _product((x.values, x.scale), weight, bias, x.dtype)


def _needs_inputs(weight: Fp8Weight) -> bool:
    """Whether an FP8 layer's input is wanted as a tensor, before it is quantized."""
    return weight.wide or not _quantizes or _note is not None


def _quantized_in_parts(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.quantize` without fp32 copies of all of x, for which there may be no memory beside a compiled model."""
    quantized = torch.empty(x.shape, dtype=fp8.FP8, device=x.device)
    for out, part in zip(quantized.split(_NOTED_TOKENS, -2), x.split(_NOTED_TOKENS, -2), strict=True):
        out.copy_(fp8.quantize_tensor(part, scale))
    return quantized, scale


def _product(quantized: tuple[Tensor, Tensor], weight: Fp8Weight, bias: Tensor, dtype: torch.dtype) -> Tensor:
    product = fp8_export.scaled_linear if fp8_export.exporting() else fp8.scaled_linear
    return product(*quantized, weight.weight, weight.scale, bias, dtype)


def _exact(x: Tensor, weight: Fp8Weight, bias: Tensor) -> Tensor:
    return F.linear(x, fp8.dequantize(weight.weight, weight.scale, x.dtype), bias.to(x.dtype))
