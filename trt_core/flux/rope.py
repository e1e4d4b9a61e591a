"""Rotary position embedding of FLUX.1: angles outside the segments in fp32, rotation inside them."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cos_sin(ids: Tensor, axes_dim: tuple[int, ...], theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, each [tokens, head_dim / 2] in fp32.

    `ids` is [tokens, 3]: index, row and column of each token. Angles are computed in fp64 as BFL and diffusers do
    (https://arxiv.org/abs/2104.09864, axes concatenated), then rounded once.
    """
    positions = ids.double()
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(positions[:, axis, None] * (theta**-exponents)[None, :])
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` rotated pair by pair, in fp32. x [B, L, H, D] with neighbours as pairs; cos, sin [L, D / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
