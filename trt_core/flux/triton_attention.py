"""Triton kernels that make E4M3 q, k and v of a block's fused products (`fp8_attention` holds the reference).

Two launches: the first reads each token's q, k and v once, writes q and k normalised, rotated and rounded, and v's
largest magnitude in that row; the second reduces those and quantizes v, which was read just before and is in the L2
cache. Text and image tokens come from two products and are joined on the way, text first.
"""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8_attention import QkvStream
from .triton_rows import amax_bits, scale_from_bits

_ROWS = 8
"""Rows of v for one program: each reads all rows' magnitudes, 4 bytes per row, to find the largest."""
_MAGNITUDES = 4096
"""Magnitudes that are reduced at a time."""


@triton.jit
def _normed_rotated(row_ptr, scale_ptr, cos, sin, EPS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr,
                    DIM: tl.constexpr):  # fmt: skip
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, DIM)[None, :]
    x = tl.load(row_ptr + head * DIM + column, mask=head < HEADS, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + column).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + EPS) * scale
    even, odd = tl.split(tl.reshape(x, (HEADS_BLOCK, DIM // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (HEADS_BLOCK, DIM))


@triton.jit
def _queries_keys_kernel(
    img_ptr, txt_ptr, query_ptr, key_ptr, magnitude_ptr,
    img_query_norm_ptr, img_key_norm_ptr, txt_query_norm_ptr, txt_key_norm_ptr,
    img_cos_ptr, img_sin_ptr, txt_cos_ptr, txt_sin_ptr,
    n_txt, n_all, img_stride_b, img_stride_l, txt_stride_b, txt_stride_l,
    EPS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program is one token of all heads."""
    pid = tl.program_id(0)
    batch, token = (pid // n_all).to(tl.int64), pid % n_all
    if token < n_txt:
        place = token
        row_ptr = txt_ptr + batch * txt_stride_b + place.to(tl.int64) * txt_stride_l
        query_norm_ptr, key_norm_ptr = txt_query_norm_ptr, txt_key_norm_ptr
        cos_ptr, sin_ptr = txt_cos_ptr, txt_sin_ptr
    else:
        place = token - n_txt
        row_ptr = img_ptr + batch * img_stride_b + place.to(tl.int64) * img_stride_l
        query_norm_ptr, key_norm_ptr = img_query_norm_ptr, img_key_norm_ptr
        cos_ptr, sin_ptr = img_cos_ptr, img_sin_ptr
    half = tl.arange(0, DIM // 2)[None, :]
    cos = tl.load(cos_ptr + place * (DIM // 2) + half)
    sin = tl.load(sin_ptr + place * (DIM // 2) + half)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    places = pid.to(tl.int64) * (HEADS * DIM) + head * DIM + tl.arange(0, DIM)[None, :]
    q = _normed_rotated(row_ptr, query_norm_ptr, cos, sin, EPS, HEADS, HEADS_BLOCK, DIM)
    tl.store(query_ptr + places, q.to(query_ptr.dtype.element_ty), mask=head < HEADS)
    k = _normed_rotated(row_ptr + HEADS * DIM, key_norm_ptr, cos, sin, EPS, HEADS, HEADS_BLOCK, DIM)
    tl.store(key_ptr + places, k.to(key_ptr.dtype.element_ty), mask=head < HEADS)
    column = tl.arange(0, HIDDEN_BLOCK)
    v = tl.load(row_ptr + 2 * HEADS * DIM + column, mask=column < HEADS * DIM, other=0.0).to(tl.float32)
    tl.store(magnitude_ptr + pid, amax_bits(v))


@triton.jit
def _values_kernel(
    img_ptr, txt_ptr, magnitude_ptr, out_ptr, scale_ptr, rows, n_txt, n_all,
    img_stride_b, img_stride_l, txt_stride_b, txt_stride_l,
    ROWS: tl.constexpr, MAGNITUDES: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program is ROWS tokens of v, divided by the scale of all of v."""
    largest = tl.zeros((MAGNITUDES,), dtype=tl.int32)
    for start in range(0, rows, MAGNITUDES):
        index = start + tl.arange(0, MAGNITUDES)
        largest = tl.maximum(largest, tl.load(magnitude_ptr + index, mask=index < rows, other=0))
    scale = scale_from_bits(tl.max(largest, axis=0))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    factor = 1.0 / scale
    column = tl.arange(0, HIDDEN_BLOCK)
    for index in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + index
        batch, token = (row // n_all).to(tl.int64), row % n_all
        if token < n_txt:
            row_ptr = txt_ptr + batch * txt_stride_b + token.to(tl.int64) * txt_stride_l
        else:
            row_ptr = img_ptr + batch * img_stride_b + (token - n_txt).to(tl.int64) * img_stride_l
        inside = (column < HIDDEN) & (row < rows)
        v = tl.load(row_ptr + 2 * HIDDEN + column, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(out_ptr + row.to(tl.int64) * HIDDEN + column, v.to(out_ptr.dtype.element_ty), mask=inside)


def quantized_qkv(
    img: QkvStream, txt: QkvStream | None, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, n_txt + n_img, H, D] in E4M3, contiguous, and v's scale, fp32 [1]; text tokens first where there are
    any."""
    n_txt, txt = (0, img) if txt is None else (txt.qkv.shape[1], txt)
    batch, n_img, _ = img.qkv.shape
    dim, n_all = img.query_norm.shape[0], n_img + n_txt
    rows = batch * n_all
    shape, device = (batch, n_all, heads, dim), img.qkv.device
    query, key, value = (torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) for _ in range(3))
    magnitudes = torch.empty((rows,), dtype=torch.int32, device=device)
    scale = torch.empty((1,), dtype=torch.float32, device=device)
    strides = (img.qkv.stride(0), img.qkv.stride(1), txt.qkv.stride(0), txt.qkv.stride(1))
    block = triton.next_power_of_2(heads * dim)
    _queries_keys_kernel[(rows,)](
        img.qkv, txt.qkv, query, key, magnitudes, img.query_norm, img.key_norm, txt.query_norm, txt.key_norm,
        img.cos, img.sin, txt.cos, txt.sin, n_txt, n_all, *strides,
        EPS=eps, HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads), DIM=dim, HIDDEN_BLOCK=block, num_warps=4,
    )  # fmt: skip
    _values_kernel[(triton.cdiv(rows, _ROWS),)](
        img.qkv, txt.qkv, magnitudes, value, scale, rows, n_txt, n_all, *strides,
        ROWS=_ROWS, MAGNITUDES=_MAGNITUDES, HIDDEN=heads * dim, HIDDEN_BLOCK=block, num_warps=4,
    )  # fmt: skip
    return query, key, value, scale
