"""What surrounds FLUX.1's blocks: embeddings before, modulations beside, the final layer after. 0.4 % of the work."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8
from .architecture import FluxArchitecture
from .fused import modulated_norm
from .precision import SCALE
from .weights import SWAPPED_HALVES

Weights = Mapping[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """The layer's product; one stored in FP8 (modulations) is read as such and multiplied in the inputs' dtype."""
    weight, bias, scale = weights[f"{name}.weight"], weights[f"{name}.bias"], weights.get(f"{name}.{SCALE}")
    return F.linear(x, weight, bias) if scale is None else fp8.weight_only_linear(x, weight, scale, bias)


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding [B, dim] in fp32, cosines first. `t` [B] is already scaled by 1000.

    Source: black-forest-labs/flux, src/flux/modules/layers.py.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def conditioning(
    weights: Weights, arch: FluxArchitecture, timesteps: Tensor, guidance: Tensor | None, y: Tensor
) -> Tensor:
    """vec [B, hidden]: timestep, guidance (where the model has it) and pooled text together.

    `timesteps` and `guidance` [B] are scaled by 1000 in their own dtype, as each host rounds them; y [B, vec_dim].
    """
    dtype = weights["time_in.in_layer.weight"].dtype
    vec = _embed(weights, "time_in", timestep_embedding(timesteps * 1000).to(dtype))
    if arch.guidance and guidance is not None:
        vec = vec + _embed(weights, "guidance_in", timestep_embedding(guidance * 1000).to(dtype))
    return vec + _embed(weights, "vector_in", y.to(dtype))


def modulation(weights: Weights, name: str, activated_vec: Tensor, hidden: int) -> Tensor:
    """[n, B, hidden]: the shifts, scales and gates that linear layer `name` makes of silu(vec) [B, hidden]."""
    out = linear(weights, name, activated_vec)
    if out.shape[0] == 1:
        # Not transpose().contiguous(): a batch of 1 counts as contiguous with any stride, and compiled segments are
        # specialised on strides.
        return out.view(-1, 1, hidden)
    return out.unflatten(-1, (-1, hidden)).transpose(0, 1).contiguous()


class Modulations:
    """The modulations of one step, by layer name ("double_blocks.0.img_mod", "single_blocks.0.modulation").

    Each is computed when its block asks, not all before the first block: the GPU would wait while Python starts 76
    small products (a step in FP8 took 87 ms that way, its kernels 80), and now they are started while blocks run.
    """

    def __init__(self, weights: Weights, arch: FluxArchitecture, vec: Tensor) -> None:
        self._weights, self._hidden, self._activated = weights, arch.hidden, F.silu(vec)

    def __call__(self, name: str) -> Tensor:
        return modulation(self._weights, f"{name}.lin", self._activated, self._hidden)


def final_layer(weights: Weights, img: Tensor, vec: Tensor, scale_first: bool) -> Tensor:
    """[B, n_img, out_channels]. `scale_first` says that the halves of adaLN_modulation are in diffusers' order."""
    halves = linear(weights, SWAPPED_HALVES[0].removesuffix(".weight"), F.silu(vec)).chunk(2, dim=-1)
    shift, scale = reversed(halves) if scale_first else halves
    return linear(weights, "final_layer.linear", modulated_norm(img, shift, scale))


def _embed(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.out_layer", F.silu(linear(weights, f"{name}.in_layer", x)))
