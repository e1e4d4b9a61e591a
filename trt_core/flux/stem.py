"""What surrounds FLUX.1's blocks: embeddings before, modulations beside, the final layer after. 0.4 % of the work."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import storage
from .architecture import FluxArchitecture
from .branches import Branches
from .fused import modulated_norm
from .precision import SCALE
from .weights import SWAPPED_HALVES

Weights = Mapping[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """The layer's product."""
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


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


class Modulations:
    """The modulations of one step, by layer name ("double_blocks.0.img_mod", "single_blocks.0.modulation").

    Each is computed when its block asks, not all before the first block: the GPU would wait while Python starts 76
    small products (a step in FP8 took 87 ms that way, its kernels 80), and now they are started while blocks run.
    """

    def __init__(self, weights: Weights, hidden: int, vec: Tensor, branches: Branches | None = None) -> None:
        self._weights, self._hidden, self._activated = weights, hidden, F.silu(vec)
        self._added = {} if branches is None else branches.added(self._activated)

    def __call__(self, name: str) -> Tensor:
        """[n, B, hidden]: the shifts, scales and gates that the block's linear layer makes of silu(vec) [B, hidden]."""
        out = self._product(f"{name}.lin")
        if out.shape[0] == 1:
            # Not transpose().contiguous(): a batch of 1 counts as contiguous with any stride, and compiled segments are
            # specialised on strides.
            return out.view(-1, 1, self._hidden)
        return out.unflatten(-1, (-1, self._hidden)).transpose(0, 1).contiguous()

    def _product(self, layer: str) -> Tensor:
        weight, bias = self._weights[f"{layer}.weight"], self._weights[f"{layer}.bias"]
        scale = self._weights.get(f"{layer}.{SCALE}")
        return storage.linear(self._activated, weight, scale, bias, self._added.get(layer))


def final_layer(weights: Weights, img: Tensor, vec: Tensor, scale_first: bool) -> Tensor:
    """[B, n_img, out_channels]. `scale_first` says that the halves of adaLN_modulation are in diffusers' order."""
    halves = linear(weights, SWAPPED_HALVES[0].removesuffix(".weight"), F.silu(vec)).chunk(2, dim=-1)
    shift, scale = reversed(halves) if scale_first else halves
    return linear(weights, "final_layer.linear", modulated_norm(img, shift, scale))


def _embed(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.out_layer", F.silu(linear(weights, f"{name}.in_layer", x)))
