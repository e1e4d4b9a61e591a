"""Triton kernels that make E4M3 q, k and v of a block's fused products (`fp8_attention` holds the reference).

Two launches: the first finds how large v can be, from its weight and the modulation; the second reads each token's q, k
and v once and writes them rounded, q and k normalised and rotated, and finds v's largest magnitude on the way. Text and
image tokens come from two products and are joined, text first.
"""
# ruff: noqa: N803 - Triton writes compile-time constants in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8_attention import BOUND_MARGIN, QkvStream, QuantizedQkv, ValueSource, input_length
from .triton_rows import amax_bits, clamped, scale_from_bits

_ROWS, _COLUMNS = 8, 512
"""Of v's weight: what one program bounds, and how much of those rows it holds at a time, each row in one warp."""


@triton.jit
def _bound_kernel(
    img_weight_ptr, img_scale_ptr, img_bias_ptr, img_shift_ptr, img_mod_ptr,
    txt_weight_ptr, txt_scale_ptr, txt_bias_ptr, txt_shift_ptr, txt_mod_ptr,
    bound_ptr, scale_ptr, factor_ptr, rows, pictures,
    img_stride, txt_stride, img_shift_stride, img_mod_stride, txt_shift_stride, txt_mod_stride,
    IMG_SCALES: tl.constexpr, TXT_SCALES: tl.constexpr, LENGTH: tl.constexpr, MARGIN: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`ValueSource.bound` of ROWS rows of one stream's weight: program (rows, stream).

    IMG_SCALES, TXT_SCALES: scales of the weight, 0, 1 or 2 for one per row. The first program also writes what the next
    kernel's minimum and maximum start from.
    """
    if tl.program_id(1) == 0:
        bound = _bound_of_rows(
            img_weight_ptr, img_scale_ptr, img_bias_ptr, img_shift_ptr, img_mod_ptr, rows, pictures,
            img_stride, img_shift_stride, img_mod_stride, IMG_SCALES, LENGTH, ROWS, WIDTH, COLUMNS,
        )  # fmt: skip
    else:
        bound = _bound_of_rows(
            txt_weight_ptr, txt_scale_ptr, txt_bias_ptr, txt_shift_ptr, txt_mod_ptr, rows, pictures,
            txt_stride, txt_shift_stride, txt_mod_stride, TXT_SCALES, LENGTH, ROWS, WIDTH, COLUMNS,
        )  # fmt: skip
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(bound_ptr + place, amax_bits(bound * MARGIN).to(tl.float32, bitcast=True))
    if place == 0:
        tl.store(scale_ptr, 0)
        tl.store(factor_ptr, 0x7F800000)  # infinity


@triton.jit
def _bound_of_rows(
    weight_ptr, scale_ptr, bias_ptr, shift_ptr, mod_ptr, rows, pictures, stride, shift_stride, mod_stride,
    SCALES: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), rows - 1)
    row_ptr = weight_ptr + row.to(tl.int64)[:, None] * stride
    # Sums stay apart until the last column: a reduction for each part would cost more than the reading.
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in tl.static_range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        weight = tl.load(row_ptr + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        reach = tl.zeros((COLUMNS,), dtype=tl.float32)
        for picture in range(pictures):
            shift = tl.load(shift_ptr + picture * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
            gain = 1.0 + tl.load(mod_ptr + picture * mod_stride + column, mask=inside, other=0.0).to(tl.float32)
            reach = tl.maximum(reach, gain * gain + shift * shift, propagate_nan=tl.PropagateNan.ALL)
        squares += weight * weight * reach[None, :]
    bound = tl.sqrt(tl.sum(squares, axis=1)) * LENGTH
    if SCALES == 2:
        bound *= tl.load(scale_ptr + row)
    elif SCALES == 1:
        bound *= tl.load(scale_ptr)
    return bound + tl.abs(tl.load(bias_ptr + row).to(tl.float32))


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
def _queries_keys_values_kernel(
    img_ptr, txt_ptr, query_ptr, key_ptr, value_ptr, bound_ptr, scale_ptr, factor_ptr, bounds,
    img_query_norm_ptr, img_key_norm_ptr, txt_query_norm_ptr, txt_key_norm_ptr,
    img_cos_ptr, img_sin_ptr, txt_cos_ptr, txt_sin_ptr,
    n_txt, n_all, img_stride_b, img_stride_l, txt_stride_b, txt_stride_l,
    EPS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """One program is one token of all heads. `scale_ptr` and `factor_ptr` point to the bits of positive fp32 numbers,
    whose order is that of integers, with NaN above all."""
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
    bound = tl.load(bound_ptr + tl.arange(0, BOUNDS), mask=tl.arange(0, BOUNDS) < bounds, other=0.0)
    own = scale_from_bits(amax_bits(bound))
    values = clamped(v * (1.0 / own))
    place = pid.to(tl.int64) * (HEADS * DIM) + column
    tl.store(value_ptr + place, values.to(value_ptr.dtype.element_ty), mask=column < HEADS * DIM)
    wanted = scale_from_bits(amax_bits(v))
    tl.atomic_max(scale_ptr, wanted.to(tl.int32, bitcast=True), sem="relaxed")
    tl.atomic_min(factor_ptr, tl.div_rn(own, wanted).to(tl.int32, bitcast=True), sem="relaxed")


def quantized_qkv(img: QkvStream, txt: QkvStream | None, heads: int, eps: float) -> QuantizedQkv:
    """`fp8_attention.quantized_qkv` of streams whose `source` is known."""
    n_txt, txt, streams = (0, img, 1) if txt is None else (txt.qkv.shape[1], txt, 2)
    batch, n_img, _ = img.qkv.shape
    dim, n_all = img.query_norm.shape[0], n_img + n_txt
    shape, device = (batch, n_all, heads, dim), img.qkv.device
    query, key, value = (torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) for _ in range(3))
    bounds, scale, factor = _bounds(img.source, txt.source, batch, streams)
    _queries_keys_values_kernel[(batch * n_all,)](
        img.qkv, txt.qkv, query, key, value, bounds, scale, factor, bounds.shape[0],
        img.query_norm, img.key_norm, txt.query_norm, txt.key_norm, img.cos, img.sin, txt.cos, txt.sin,
        n_txt, n_all, img.qkv.stride(0), img.qkv.stride(1), txt.qkv.stride(0), txt.qkv.stride(1),
        EPS=eps, HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads), DIM=dim,
        HIDDEN_BLOCK=triton.next_power_of_2(heads * dim), BOUNDS=triton.next_power_of_2(bounds.shape[0]), num_warps=4,
    )  # fmt: skip
    return QuantizedQkv(query, key, value, scale.view(torch.float32), factor.view(torch.float32))


def _bounds(
    img: ValueSource | None, txt: ValueSource | None, batch: int, streams: int
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 bounds, of which the largest counts, and the bits (int32 [1]) that v's scale and factor start from."""
    if img is None or txt is None:
        raise ValueError("quantized_qkv needs to know what v is made of")
    device, (rows, width) = img.weight.device, img.weight.shape
    programs = triton.cdiv(rows, _ROWS)
    bounds = torch.empty((streams * programs,), dtype=torch.float32, device=device)
    scale, factor = (torch.empty((1,), dtype=torch.int32, device=device) for _ in range(2))
    (*img_tensors, img_scales), (*txt_tensors, txt_scales) = _operands(img), _operands(txt)
    _bound_kernel[(programs, streams)](
        *img_tensors, *txt_tensors, bounds, scale, factor, rows, batch, img.weight.stride(0), txt.weight.stride(0),
        img.shift.stride(0), img.scale.stride(0), txt.shift.stride(0), txt.scale.stride(0),
        IMG_SCALES=img_scales, TXT_SCALES=txt_scales, LENGTH=input_length(width),
        MARGIN=BOUND_MARGIN, ROWS=_ROWS, WIDTH=width, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return bounds, scale, factor


def _operands(source: ValueSource) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """weight, its scale (any tensor where there is none), bias, shift, scale, and how many scales there are."""
    scale = source.weight_scale
    scales = 0 if scale is None else 1 if scale.numel() == 1 else 2
    return source.weight, source.bias if scale is None else scale, source.bias, source.shift, source.scale, scales
