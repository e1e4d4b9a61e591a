"""q/k norm and RoPE: one Triton kernel inside Inductor's code on a GPU, plain PyTorch everywhere else.

Measured on one H200 at 4608 tokens: Inductor's own kernel takes 0.116 ms for q and k of a single block and 0.12 ms for
those of a double block, where reading and writing them once takes 0.03 ms.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rotate

EPS = 1e-6
_kernels: ModuleType | None = None


def load_kernels() -> None:
    """Imports the Triton kernels where Triton is installed. Before compiling: Dynamo does not trace imports well."""
    global _kernels
    if _kernels is None and importlib.util.find_spec("triton") is not None:
        from . import triton_kernels

        _kernels = triton_kernels


def norm_rope(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D] after RMS norm over D with `scale` [D] and RoPE by cos, sin [L, D / 2], rounded once."""
    if _use_kernels(x) and _kernels is not None:
        return _kernels.norm_rope(x, x, scale, scale, cos, sin, cos, sin, 0, EPS)
    return rotate(rms_norm(x, scale), cos, sin).to(x.dtype)


def joint_norm_rope(
    txt: Tensor, img: Tensor, txt_scale: Tensor, img_scale: Tensor,
    txt_cos: Tensor, txt_sin: Tensor, img_cos: Tensor, img_sin: Tensor,
) -> Tensor:  # fmt: skip
    """`norm_rope` of txt and img, each with its own scale and angles, joined along the tokens, text first."""
    if _use_kernels(img) and _kernels is not None:
        return _kernels.norm_rope(img, txt, img_scale, txt_scale, img_cos, img_sin, txt_cos, txt_sin, txt.shape[1], EPS)
    parts = (norm_rope(txt, txt_scale, txt_cos, txt_sin), norm_rope(img, img_scale, img_cos, img_sin))
    return torch.cat(parts, dim=1)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm over the last axis. Compiled, it stays in fp32 and is fused with RoPE; eager, it is one kernel."""
    if not torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), scale, eps=EPS)
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * scale.float()


def _use_kernels(x: Tensor) -> bool:
    """Only inside Inductor's code: TensorRT's export must see plain operations, and eager is everyone's reference."""
    # Not is_exporting(): Dynamo answers True to that as well.
    return x.is_cuda and torch.compiler.is_dynamo_compiling()
