"""Triton kernels that make the rows a matrix product reads, rounded or quantized to E4M3 (`fused`, `fp8`: references).

One program is one row (token), read once and kept in fp32 registers. The constant QUANTIZE says what is stored: 0 the
row in the output's dtype; 1 `value / scale` with one scale from `scale_ptr`; 2 the same with the row's own scale, which
is written to `scale_ptr`. Quantized values come from the fp32 row, not from one rounded to bf16 first. EPS is constant,
too: Inductor hands Python's floats over as fp64, and everything that one touches becomes fp64.
"""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .open_sum import OpenSum

ROUNDED, STATIC, PER_ROW = 0, 1, 2


@triton.jit
def amax_bits(x):
    """The largest |x| as the bits of an fp32: such integers are ordered like the floats, with NaN above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def scale_from_bits(bits):
    """`fp8.row_scale`: max(amax, AMAX_FLOOR) / FP8_MAX, NaN for a row that holds one."""
    amax = bits.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.maximum(amax, 1e-12, propagate_nan=tl.PropagateNan.ALL), 448.0)


@triton.jit
def clamped(x):
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(x, QUICK: tl.constexpr):
    """GELU's tanh form: 0.5 * (1 + tanh(u)) is sigmoid(2 * u).

    QUICK: by the GPU's own tanh, one instruction, off by 2 ** -11 at most; that is a sixtieth of what E4M3 rounds off,
    and an exponential with a division takes longer there than the memory does.
    """
    if QUICK:
        u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        half = 0.5 * x
        return half + half * tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32,
                                                       is_pure=True, pack=1)  # fmt: skip
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _load(row_ptr, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store(row_ptr, start, x, factor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    if QUANTIZE == 1:
        x = clamped(x * factor)
    if QUANTIZE == 2:
        x = x * factor  # within 448 by its own scale, up to the last bit, and E4M3 rounds that down
    tl.store(row_ptr + column, x.to(row_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _factor(bits, scale_ptr, row, QUANTIZE: tl.constexpr):
    """1 / scale: a division for each element would take longer than the memory does."""
    if QUANTIZE == 0:
        return 1.0
    elif QUANTIZE == 1:
        return 1.0 / tl.load(scale_ptr)
    else:
        scale = scale_from_bits(bits)
        tl.store(scale_ptr + row, scale)
        return 1.0 / scale


@triton.jit
def _offset(row, tokens, stride_b, stride_l):
    return (row // tokens).to(tl.int64) * stride_b + (row % tokens).to(tl.int64) * stride_l


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, tokens, x_stride_b, x_stride_l,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x = _load(x_ptr + _offset(row, tokens, x_stride_b, x_stride_l), 0, WIDTH, BLOCK)
    factor = _factor(amax_bits(x), scale_ptr, row, QUANTIZE)
    _store(out_ptr + row.to(tl.int64) * WIDTH, 0, x, factor, WIDTH, BLOCK, QUANTIZE)


@triton.jit
def _modulated(x, shift, scale, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Layer norm of WIDTH numbers, times 1 + scale, plus shift; 0 in columns beyond WIDTH, where both are 0."""
    x = tl.where(tl.arange(0, BLOCK) < WIDTH, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + EPS) * (1.0 + scale) + shift


@triton.jit
def _modulated_norm_kernel(
    x_ptr, mod_shift_ptr, mod_scale_ptr, out_ptr, scale_ptr,
    tokens, x_stride_b, x_stride_l, shift_stride_b, scale_stride_b,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch = (row // tokens).to(tl.int64)
    x = _load(x_ptr + _offset(row, tokens, x_stride_b, x_stride_l), 0, WIDTH, BLOCK)
    shift = _load(mod_shift_ptr + batch * shift_stride_b, 0, WIDTH, BLOCK)
    scale = _load(mod_scale_ptr + batch * scale_stride_b, 0, WIDTH, BLOCK)
    x = _modulated(x, shift, scale, EPS, WIDTH, BLOCK)
    factor = _factor(amax_bits(x), scale_ptr, row, QUANTIZE)
    _store(out_ptr + row.to(tl.int64) * WIDTH, 0, x, factor, WIDTH, BLOCK, QUANTIZE)


@triton.jit
def _gated_norm_kernel(
    x_ptr, add_ptr, gate_ptr, mod_shift_ptr, mod_scale_ptr, sum_ptr, out_ptr, scale_ptr,
    tokens, x_stride_b, x_stride_l, add_stride_b, add_stride_l, gate_stride_b, shift_stride_b, scale_stride_b,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """x + gate * add, rounded and stored, and the modulated norm of what was stored."""
    row = tl.program_id(0)
    batch = (row // tokens).to(tl.int64)
    x = _load(x_ptr + _offset(row, tokens, x_stride_b, x_stride_l), 0, WIDTH, BLOCK)
    add = _load(add_ptr + _offset(row, tokens, add_stride_b, add_stride_l), 0, WIDTH, BLOCK)
    gate = _load(gate_ptr + batch * gate_stride_b, 0, WIDTH, BLOCK)
    shift = _load(mod_shift_ptr + batch * shift_stride_b, 0, WIDTH, BLOCK)
    scale = _load(mod_scale_ptr + batch * scale_stride_b, 0, WIDTH, BLOCK)
    x = x + gate * add
    if sum_ptr.dtype.element_ty == tl.float16:
        x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = x.to(sum_ptr.dtype.element_ty)
    column = tl.arange(0, BLOCK)
    tl.store(sum_ptr + row.to(tl.int64) * WIDTH + column, rounded, mask=column < WIDTH)
    x = _modulated(rounded.to(tl.float32), shift, scale, EPS, WIDTH, BLOCK)
    factor = _factor(amax_bits(x), scale_ptr, row, QUANTIZE)
    _store(out_ptr + row.to(tl.int64) * WIDTH, 0, x, factor, WIDTH, BLOCK, QUANTIZE)


@triton.jit
def _join_gelu_kernel(
    attn_ptr, attn_scale_ptr, mlp_ptr, out_ptr, scale_ptr, tokens,
    attn_stride_b, attn_stride_l, mlp_stride_b, mlp_stride_l,
    HIDDEN: tl.constexpr, HIDDEN_BLOCK: tl.constexpr, MLP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    QUANTIZE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """HIDDEN columns of attn (there may be none; SCALED: times what `attn_scale_ptr` points to), then GELU of MLP
    columns in blocks FIRST and REST."""
    row = tl.program_id(0)
    mlp_row = mlp_ptr + _offset(row, tokens, mlp_stride_b, mlp_stride_l)
    first = _gelu(_load(mlp_row, 0, MLP, FIRST), QUANTIZE > 0)
    bits = amax_bits(first)
    if REST > 0:
        rest = _gelu(_load(mlp_row, FIRST, MLP, REST), QUANTIZE > 0)
        bits = tl.maximum(bits, amax_bits(rest))
    if HIDDEN > 0:
        attn = _load(attn_ptr + _offset(row, tokens, attn_stride_b, attn_stride_l), 0, HIDDEN, HIDDEN_BLOCK)
        if SCALED:
            attn = attn * tl.load(attn_scale_ptr)
        bits = tl.maximum(bits, amax_bits(attn))
    factor = _factor(bits, scale_ptr, row, QUANTIZE)
    out_row = out_ptr + row.to(tl.int64) * (HIDDEN + MLP)
    if HIDDEN > 0:
        _store(out_row, 0, attn, factor, HIDDEN, HIDDEN_BLOCK, QUANTIZE)
    _store(out_row + HIDDEN, 0, first, factor, MLP, FIRST, QUANTIZE)
    if REST > 0:
        _store(out_row + HIDDEN, FIRST, rest, factor, MLP, REST, QUANTIZE)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`fused.modulated_norm` as a contiguous [B, L, D], rounded once. x may be strided over batch and tokens."""
    return _modulated_norm(x, shift, scale, eps, ROUNDED, None)[0]


def modulated_norm_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, input_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`modulated_norm` in E4M3 and its scales: `input_scale` (one element), or with None new ones [B, L, 1]."""
    return _modulated_norm(x, shift, scale, eps, PER_ROW if input_scale is None else STATIC, input_scale)


def gated_norm(stream: OpenSum, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`fused.gated_norm` as two contiguous [B, L, D], each rounded once; x and add may be strided."""
    x, out, _ = _gated_norm(stream, shift, scale, eps, ROUNDED, None)
    return x, out


def gated_norm_fp8(
    stream: OpenSum, shift: Tensor, scale: Tensor, eps: float, input_scale: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`gated_norm` with the norm in E4M3 and its scales, as in `modulated_norm_fp8`."""
    mode = PER_ROW if input_scale is None else STATIC
    x, out, scales = _gated_norm(stream, shift, scale, eps, mode, input_scale)
    return x, (out, scales)


def join_gelu(attn: Tensor, mlp: Tensor) -> Tensor:
    """`fused.join_gelu` as a contiguous [B, L, hidden + mlp_hidden]; both may be strided over batch and tokens."""
    return _join_gelu(attn, mlp, attn.shape[-1], ROUNDED, None)[0]


def join_gelu_fp8(
    attn: Tensor, mlp: Tensor, input_scale: Tensor | None, attn_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`join_gelu` in E4M3 and its scales, as in `modulated_norm_fp8`; attn times `attn_scale` (one element), if any."""
    mode = PER_ROW if input_scale is None else STATIC
    return _join_gelu(attn, mlp, attn.shape[-1], mode, input_scale, attn_scale)


def gelu_fp8(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """GELU (tanh form) of x [B, L, K] in E4M3 and its scales, as in `modulated_norm_fp8`."""
    return _join_gelu(x, x, 0, PER_ROW if input_scale is None else STATIC, input_scale)


def quantize_fp8(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, L, K] in E4M3 and its scales, as in `modulated_norm_fp8`; x may be strided over batch and tokens."""
    x, mode, width = _rows(x), PER_ROW if input_scale is None else STATIC, x.shape[-1]
    out, scales = _outputs(x, width, mode, input_scale)
    _quantize_kernel[(x.shape[0] * x.shape[1],)](
        x, out, scales, x.shape[1], x.stride(0), x.stride(1),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), QUANTIZE=mode, num_warps=_warps(width),
    )  # fmt: skip
    return out, scales


def _modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, mode: int, input_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, shift, scale, width = _rows(x), _rows(shift), _rows(scale), x.shape[-1]
    out, scales = _outputs(x, width, mode, input_scale)
    _modulated_norm_kernel[(x.shape[0] * x.shape[1],)](
        x, shift, scale, out, scales, x.shape[1], x.stride(0), x.stride(1), shift.stride(0), scale.stride(0),
        EPS=eps, WIDTH=width, BLOCK=triton.next_power_of_2(width), QUANTIZE=mode, num_warps=_warps(width),
    )  # fmt: skip
    return out, scales


def _gated_norm(
    stream: OpenSum, shift: Tensor, scale: Tensor, eps: float, mode: int, input_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    x, add, gate, shift, scale = (_rows(tensor) for tensor in (*stream, shift, scale))
    width = x.shape[-1]
    out, scales = _outputs(x, width, mode, input_scale)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _gated_norm_kernel[(x.shape[0] * x.shape[1],)](
        x, add, gate, shift, scale, total, out, scales, x.shape[1], x.stride(0), x.stride(1),
        add.stride(0), add.stride(1), gate.stride(0), shift.stride(0), scale.stride(0),
        EPS=eps, WIDTH=width, BLOCK=triton.next_power_of_2(width), QUANTIZE=mode, num_warps=_warps(width),
    )  # fmt: skip
    return total, out, scales


def _join_gelu(
    attn: Tensor, mlp: Tensor, hidden: int, mode: int, input_scale: Tensor | None, attn_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    attn, mlp, width = _rows(attn), _rows(mlp), mlp.shape[-1]
    out, scales = _outputs(mlp, hidden + width, mode, input_scale)
    first, warps = _gelu_blocks(width, hidden + width, mode)
    _join_gelu_kernel[(mlp.shape[0] * mlp.shape[1],)](
        attn, scales if attn_scale is None else attn_scale, mlp, out, scales, mlp.shape[1],
        attn.stride(0), attn.stride(1), mlp.stride(0), mlp.stride(1),
        HIDDEN=hidden, HIDDEN_BLOCK=triton.next_power_of_2(max(1, hidden)), MLP=width, FIRST=first,
        REST=triton.next_power_of_2(width - first) if width > first else 0, QUANTIZE=mode,
        SCALED=attn_scale is not None, num_warps=warps,
    )  # fmt: skip
    return out, scales


def _gelu_blocks(width: int, row: int, mode: int) -> tuple[int, int]:
    """Columns of the first block, the rest being the second, and warps.

    To FP8, measured on an H100 for 3072 + 12288 columns: one block of 16384 with 8 warps 0.072 ms, 8192 + 4096 with 16
    warps 0.094, 0.066 at the memory's speed. To bf16, GELU's exponential counts, and two blocks leave out that of 4096
    absent columns.
    """
    if mode == ROUNDED:
        return 1 << (width.bit_length() - 1), _warps(row)
    return triton.next_power_of_2(width), min(8, _warps(row))


def _rows(x: Tensor) -> Tensor:
    """x with its last axis dense, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _outputs(x: Tensor, width: int, mode: int, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """An empty [B, L, width] and what `scale_ptr` points to; a kernel that only rounds never looks there."""
    batch, tokens, _ = x.shape
    if mode == ROUNDED:
        return torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device), x
    out = torch.empty((batch, tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    if input_scale is not None:
        return out, input_scale
    return out, torch.empty((batch, tokens, 1), dtype=torch.float32, device=x.device)


def _warps(width: int) -> int:
    """16 to 32 columns for each thread."""
    return 4 if width <= 4096 else 8 if width <= 8192 else 16
