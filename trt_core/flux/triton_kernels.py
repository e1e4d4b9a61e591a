"""Triton kernels for what Inductor does not fuse well. Imported only where Triton is; `fused` holds the references."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_rope_kernel(
    img_ptr, txt_ptr, out_ptr, img_scale_ptr, txt_scale_ptr, img_key_scale_ptr, txt_key_scale_ptr,
    img_cos_ptr, img_sin_ptr, txt_cos_ptr, txt_sin_ptr, n_txt, n_all,
    img_stride_b, img_stride_l, txt_stride_b, txt_stride_l,
    EPS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program is one token: all heads normalised over DIM, rotated pair by pair, rounded once on the store.

    Programs with a second number of 1 do the same for k, whose heads lie after those of q, with k's scales.
    """
    pid, key = tl.program_id(0), tl.program_id(1)
    batch, token = pid // n_all, pid % n_all
    if token < n_txt:
        row_ptr = txt_ptr + batch.to(tl.int64) * txt_stride_b + token.to(tl.int64) * txt_stride_l
        scale_ptr, cos_ptr, sin_ptr, place = txt_scale_ptr, txt_cos_ptr, txt_sin_ptr, token
    else:
        place = token - n_txt
        row_ptr = img_ptr + batch.to(tl.int64) * img_stride_b + place.to(tl.int64) * img_stride_l
        scale_ptr, cos_ptr, sin_ptr = img_scale_ptr, img_cos_ptr, img_sin_ptr
    if key == 1:
        row_ptr += HEADS * DIM
        scale_ptr = txt_key_scale_ptr if token < n_txt else img_key_scale_ptr
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, DIM)[None, :]
    inside = head < HEADS
    x = tl.load(row_ptr + head * DIM + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + column).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + EPS) * scale
    half = tl.arange(0, DIM // 2)[None, :]
    cos = tl.load(cos_ptr + place * (DIM // 2) + half)
    sin = tl.load(sin_ptr + place * (DIM // 2) + half)
    even, odd = tl.split(tl.reshape(x, (HEADS_BLOCK, DIM // 2, 2)))
    rotated = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    out = tl.reshape(rotated, (HEADS_BLOCK, DIM))
    out_row = out_ptr + (pid + key * tl.num_programs(0)).to(tl.int64) * (HEADS * DIM)
    tl.store(out_row + head * DIM + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def norm_rope(
    img: Tensor, txt: Tensor, img_scale: Tensor, txt_scale: Tensor,
    img_cos: Tensor, img_sin: Tensor, txt_cos: Tensor, txt_sin: Tensor, n_txt: int, eps: float,
) -> Tensor:  # fmt: skip
    """RMS norm and RoPE of the first `n_txt` tokens of `txt` and of all of `img`, as one contiguous [B, L, H, D].

    img [B, n_img, H, D] and txt [B, n_txt, H, D] may be strided over batch and tokens; heads and D lie together.
    """
    scales, angles = (img_scale, txt_scale, img_scale, txt_scale), (img_cos, img_sin, txt_cos, txt_sin)
    return _norm_rope(img, txt, scales, angles, n_txt, 1, eps)[0]


def norm_rope_qk(
    img: Tensor, txt: Tensor, img_scales: tuple[Tensor, Tensor], txt_scales: tuple[Tensor, Tensor],
    img_cos: Tensor, img_sin: Tensor, txt_cos: Tensor, txt_sin: Tensor, n_txt: int, eps: float,
) -> Tensor:  # fmt: skip
    """`norm_rope` of q and k in one launch, as [2, B, L, H, D]. `img` and `txt` are q, with k's heads right after it in
    memory; scales are q's and k's."""
    scales = (img_scales[0], txt_scales[0], img_scales[1], txt_scales[1])
    return _norm_rope(img, txt, scales, (img_cos, img_sin, txt_cos, txt_sin), n_txt, 2, eps)


def _norm_rope(
    img: Tensor, txt: Tensor, scales: tuple[Tensor, ...], angles: tuple[Tensor, ...], n_txt: int, count: int, eps: float
) -> Tensor:
    batch, n_img, heads, dim = img.shape
    n_all = n_txt + n_img
    out = torch.empty((count, batch, n_all, heads, dim), dtype=img.dtype, device=img.device)
    _norm_rope_kernel[(batch * n_all, count)](
        img, txt, out, *scales, *angles, n_txt, n_all, img.stride(0), img.stride(1), txt.stride(0), txt.stride(1),
        EPS=eps, HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads), DIM=dim, num_warps=4,
    )  # fmt: skip
    return out
