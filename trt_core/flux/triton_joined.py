"""Triton kernels for the two parts of linear2's input in E4M3, each in its own time (`fp8_joined`: the reference).

Both write into the rows of one tensor: attention's columns, then those of GELU, which also find the row's scale.
"""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_rows import PER_ROW, STATIC, amax_bits, gelu, load_row, row_offset, scale_from_bits, store_row

_WARPS = 8
"""For rows of 12288 columns, as measured for `triton_rows.join_gelu_fp8`."""


# The number of tokens is no reason to compile again: launched by Python, a kernel would be for a multiple of 16 tokens
# and for any other number.
@triton.jit(do_not_specialize=["tokens"])
def _gelu_beside_kernel(
    mlp_ptr, floor_ptr, out_ptr, scale_ptr, tokens, mlp_stride_b, mlp_stride_l,
    HIDDEN: tl.constexpr, MLP: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """GELU of one row of `mlp`, in columns HIDDEN and on of that row of `out`; the row's scale is the floor or more."""
    row = tl.program_id(0)
    x = gelu(load_row(mlp_ptr + row_offset(row, tokens, mlp_stride_b, mlp_stride_l), 0, MLP, BLOCK), True)
    if QUANTIZE == 1:
        scale = tl.load(scale_ptr)
    else:
        scale = tl.maximum(scale_from_bits(amax_bits(x)), tl.load(floor_ptr), propagate_nan=tl.PropagateNan.ALL)
        tl.store(scale_ptr + row, scale)
    store_row(out_ptr + row.to(tl.int64) * (HIDDEN + MLP) + HIDDEN, 0, x, 1.0 / scale, MLP, BLOCK, QUANTIZE)


@triton.jit
def _join_beside_gelu_kernel(
    attn_ptr, attn_scale_ptr, scale_ptr, out_ptr,
    HIDDEN: tl.constexpr, MLP: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """A row of attention's output, from its own scale to the row's."""
    row = tl.program_id(0)
    scale = tl.load(scale_ptr) if QUANTIZE == 1 else tl.load(scale_ptr + row)
    x = load_row(attn_ptr + row.to(tl.int64) * HIDDEN, 0, HIDDEN, BLOCK)
    factor = tl.load(attn_scale_ptr) * (1.0 / scale)
    store_row(out_ptr + row.to(tl.int64) * (HIDDEN + MLP), 0, x, factor, HIDDEN, BLOCK, 1)


def gelu_beside(mlp: Tensor, floor: Tensor, out: Tensor, scales: Tensor, static: bool) -> None:
    """Writes GELU (tanh form) of mlp [B, L, M] in E4M3 into the last M columns of out [B, L, hidden + M], contiguous.

    `static`: by the scale in `scales` (one element); else each row's scale, at least `floor` (one element), is written
    to scales [B, L, 1]. mlp may be strided over batch and tokens.
    """
    batch, tokens, width = mlp.shape
    _gelu_beside_kernel[(batch * tokens,)](
        mlp, floor, out, scales, tokens, mlp.stride(0), mlp.stride(1),
        HIDDEN=out.shape[-1] - width, MLP=width, BLOCK=triton.next_power_of_2(width),
        QUANTIZE=STATIC if static else PER_ROW, num_warps=_WARPS,
    )  # fmt: skip


def join_beside_gelu(attn: Tensor, attn_scale: Tensor, out: Tensor, scales: Tensor, static: bool) -> None:
    """Writes attn [B, L, hidden] (E4M3, contiguous, times `attn_scale`) into the first columns of out, by `scales`."""
    hidden = attn.shape[-1]
    _join_beside_gelu_kernel[(attn.shape[0] * attn.shape[1],)](
        attn, attn_scale, scales, out, HIDDEN=hidden, MLP=out.shape[-1] - hidden, BLOCK=triton.next_power_of_2(hidden),
        QUANTIZE=STATIC if static else PER_ROW, num_warps=4,
    )  # fmt: skip


def outputs(attn_width: int, mlp: Tensor) -> tuple[Tensor, Tensor]:
    """Empty: the joined rows [B, L, attn_width + M] in E4M3, and a scale for each, fp32 [B, L, 1]."""
    batch, tokens, width = mlp.shape
    joined = torch.empty((batch, tokens, attn_width + width), dtype=torch.float8_e4m3fn, device=mlp.device)
    return joined, torch.empty((batch, tokens, 1), dtype=torch.float32, device=mlp.device)
