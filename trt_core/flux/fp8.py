"""FP8 (E4M3) arithmetic of linear layers: activations and weights in E4M3, sums in fp32, scales in fp32.

`value = q * scale`, with one scale for each row (a token of an activation, an output of a weight) or one for a whole
tensor. The producers (`quantize`, `quantize_norm`, `quantize_gelu`, `quantize_join_gelu`) make a product's input: E4M3
[..., K] and its scales, which are the given `input_scale` (fp32, one element), or with None fresh ones, fp32 [..., 1].

Compiled on a GPU a producer is one Triton kernel that quantizes the fp32 values it computed; plain PyTorch, everywhere
else, quantizes what the operation before rounded to its dtype. They differ by that rounding, and by the last bit of the
fp32 division, which the kernels do as a multiplication by 1 / scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cublaslt, cublaslt_kernels, fused, operators
from .open_sum import OpenSum
from .products import Product
from .rows import portions, together

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
AMAX_FLOOR = 1e-12
"""Rows below this are quantized as if they reached it: a row of zeros has a scale to divide by."""


def row_scale(x: Tensor) -> Tensor:
    """fp32 [..., 1]: max(|x|) over the last axis, / 448. NaN for a row that holds NaN, inf for one that holds inf."""
    return scale_of(x.abs().amax(-1, keepdim=True))


def tensor_scale(x: Tensor) -> Tensor:
    """fp32 [1]: max(|x|) over all of `x`, / 448."""
    return scale_of(x.abs().amax().reshape(1))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [..., K] as E4M3 and its scales, fp32 [..., 1]. A row that holds NaN becomes NaN; inf becomes NaN."""
    scale = row_scale(x)
    return quantize_tensor(x, scale), scale


def quantize_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """`x` [..., K] / `scale` (fp32) as E4M3; what exceeds 448 * scale becomes 448 and NaN stays NaN."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantize(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` [..., K] in E4M3 and its scales."""
    kernels = fused.row_kernels(x, x.shape[-1])
    if kernels is not None:
        return kernels.quantize_fp8(x, input_scale)
    return quantize_rows(x) if input_scale is None else (quantize_tensor(x, input_scale), input_scale)


def quantize_norm(x: Tensor, shift: Tensor, scale: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`fused.modulated_norm` of x [B, L, D], with shift and scale [B, D], in E4M3 and its scales."""
    kernels = fused.row_kernels(x, x.shape[-1])
    if kernels is not None:
        return kernels.modulated_norm_fp8(x, shift, scale, fused.EPS, input_scale)
    return quantize(fused.modulated_norm(x, shift, scale), input_scale)


def quantize_gated_norm(
    stream: OpenSum, shift: Tensor, scale: Tensor, input_scale: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The stream added up [B, L, D], and its `fused.modulated_norm` in E4M3 with its scales."""
    kernels = fused.row_kernels(stream.x, stream.x.shape[-1])
    if kernels is not None:
        return kernels.gated_norm_fp8(stream, shift, scale, fused.EPS, input_scale)
    x = stream.closed()
    return x, quantize_norm(x, shift, scale, input_scale)


def quantize_gelu(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """GELU (tanh form) of x [B, L, K] in E4M3 and its scales."""
    kernels = fused.row_kernels(x, x.shape[-1])
    if kernels is not None:
        return kernels.gelu_fp8(x, input_scale)
    return quantize(F.gelu(x, approximate="tanh"), input_scale)


def quantize_join_gelu(
    attn: Tensor, mlp: Tensor, input_scale: Tensor | None, attn_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`fused.join_gelu` of attn [B, L, hidden] and mlp [B, L, mlp_hidden] in E4M3 and its scales.

    With `attn_scale` (fp32, one element) attn is E4M3 and stands for attn * attn_scale.
    """
    kernels = fused.row_kernels(mlp, attn.shape[-1] + mlp.shape[-1])
    if kernels is not None:
        return kernels.join_gelu_fp8(attn, mlp, input_scale, attn_scale)
    wide = attn if attn_scale is None else (attn.float() * attn_scale).to(mlp.dtype)
    return quantize(fused.join_gelu(wide, mlp), input_scale)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` (E4M3) * `scale` in fp32, rounded once to `dtype`; scale [N, 1] for [N, K], or one element."""
    return (weight.float() * scale).to(dtype)


def scaled_linear(
    q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(q * q_scale) @ (weight * weight_scale).T + bias as [..., N] in `dtype`.

    q [..., K] of two or more axes and weight [N, K] are E4M3; q_scale [..., 1] and weight_scale [N, 1] are fp32, or
    have one element; bias [N] or None in `dtype`. On a GPU K and N are multiples of 16 (`torch._scaled_mm`).
    """
    if not q.is_cuda:
        return _product_in_fp32(q, q_scale, weight, weight_scale, bias, dtype)
    if dtype is torch.bfloat16:
        row_scale = q_scale.expand(*q.shape[:-1], 1).contiguous()
        return PRODUCT(q, row_scale, weight, weight_scale.expand(weight.shape[0], 1).contiguous(), bias)
    return _wide_product(q, q_scale, weight, weight_scale, bias, dtype)


def merge_quantize(
    base: Tensor, delta: Tensor | None, factor: float, out: tuple[Tensor, Tensor] | None = None, *, per_row: bool = True
) -> tuple[Tensor, Tensor]:
    """base + factor * delta in fp32, as E4M3 [N, K] with fresh scales: a merged weight, rounded once.

    base [N, K] in any float dtype; delta [N, K], or None for the base alone. The scales are fp32 [N, 1], or without
    `per_row` [1]. `out` (weight, scale) is written in place and returned. For eager calls: with `per_row` on a GPU it
    is one Triton kernel, bit for bit what plain PyTorch computes.
    """
    weight, scale = _empty_weight(base, per_row) if out is None else out
    kernels = fused.weight_kernels(base) if per_row else None
    if kernels is not None:
        kernels.merge_quantize_rows(base, delta, factor, weight, scale)
        return weight, scale
    merged = _merged(base, delta, factor)
    scale.copy_(row_scale(merged) if per_row else tensor_scale(merged))
    weight.copy_(merged.div_(scale).clamp_(-FP8_MAX, FP8_MAX))
    return weight, scale


def scale_of(amax: Tensor, largest: float = FP8_MAX) -> Tensor:
    """fp32: `amax` / `largest`, the same bits on every device."""
    amax = amax.float().clamp(min=AMAX_FLOOR)
    # A GPU divides by a Python number as a product with its reciprocal, which is not the same bits.
    return amax / torch.full_like(amax, largest)


def _merged(base: Tensor, delta: Tensor | None, factor: float) -> Tensor:
    """A new fp32 tensor. Two operations: `torch.add(..., alpha=factor)` may be one fused multiply-add on a GPU."""
    return base.to(torch.float32, copy=True) if delta is None else (delta.float() * factor).add_(base)


def _empty_weight(base: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    weight = torch.empty(base.shape, dtype=FP8, device=base.device)
    shape = (base.shape[0], 1) if per_row else (1,)
    return weight, torch.empty(shape, dtype=torch.float32, device=base.device)


def _wide_product(
    q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """For fp16 and fp32, which the row-scaled kernel does not write: the bare sums in fp32, scaled afterwards."""
    one = torch.ones(1, dtype=torch.float32, device=q.device)
    rows = q.flatten(0, -2)
    wide = torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)
    wide = wide * q_scale.reshape(-1, 1) * weight_scale.reshape(1, -1)
    return (wide if bias is None else wide + bias).to(dtype).view((*q.shape[:-1], weight.shape[0]))


_MAX_ROWS = 8192
"""Rows that cuBLASLt multiplies at a time by a kernel of its own choice. H100, 9216 rows of FLUX's single blocks at
once 928 and 759 us, as two halves 885 and 689; 8192 rows of its double blocks are as fast at once."""
_SCALE_ALIGNMENT = 16
"""Bytes; cuBLASLt refuses scales that lie anywhere else."""


def _product(q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    out = _empty_product(q, q_scale, weight, weight_scale, bias)
    for rows, scale, part in together(q, q_scale, out):
        for portion in portions(_at_once(rows, weight), rows, scale, part):
            _write_product(*portion, weight, weight_scale, bias)
    return out


def _at_once(rows: Tensor, weight: Tensor) -> int | None:
    index = rows.device.index
    if cublaslt.why_not(index) is not None:
        return None
    return cublaslt_kernels.at_once(index, Product(rows.shape[0], *weight.shape, fp8=True)) or _MAX_ROWS


def _write_product(
    q: Tensor, q_scale: Tensor, out: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    if q_scale.data_ptr() % _SCALE_ALIGNMENT:
        q_scale = q_scale.clone()
    ours = cublaslt.why_not(q.device.index) is None
    if not (ours and cublaslt.multiply(q, q_scale, weight, weight_scale, bias, out)):
        product_by_pytorch(q, q_scale, weight, weight_scale, bias, out)


def product_by_pytorch(
    q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """`cublaslt.multiply` by PyTorch, on any GPU with FP8; q_scale [M, 1] and weight_scale [N, 1]."""
    # Also faster than the kernel with two single scales: 0.7485 ms for 0.848 ms on an H200.
    torch._scaled_mm(
        q, weight.t(), scale_a=q_scale, scale_b=weight_scale.t(), bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True, out=out,
    )  # fmt: skip


def _empty_product(q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=torch.bfloat16)


def _product_in_fp32(
    q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    wide = F.linear(q.float() * q_scale, weight.float() * weight_scale, None if bias is None else bias.float())
    return wide.to(dtype)


# q [..., K] and weight [N, K] in E4M3, q_scale [..., 1] and weight_scale [N, 1] in fp32, bias [N] and the result
# [..., N] in bf16. An operator, because Dynamo cannot trace calls of cuBLASLt.
PRODUCT = operators.define(
    __name__, "product(Tensor q, Tensor q_scale, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    _product, _product_in_fp32, _empty_product,
)  # fmt: skip
