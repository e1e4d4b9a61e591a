"""The plain forms of the fused operations: the reference that the kernels are measured against."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trt_core.flux import fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_modulated_norm(dtype: torch.dtype) -> None:
    x = (normal(2, 5, 48) * 7 + 3).to(dtype)
    shift, scale = normal(2, 48, seed=1).to(dtype), normal(2, 48, seed=2).to(dtype)
    wide = x.double()
    centered = wide - wide.sum(-1, keepdim=True) / 48
    normed = centered / (centered.square().sum(-1, keepdim=True) / 48 + 1e-6).sqrt()
    expected = normed * (1 + scale.double()[:, None]) + shift.double()[:, None]
    seen = fused.modulated_norm(x, shift, scale)
    assert seen.dtype is dtype
    assert (seen.double() - expected).abs().max() < 12 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_modulated_norm_keeps_the_bits_of_pytorchs_layer_norm(dtype: torch.dtype) -> None:
    x, shift, scale = (t.to(dtype) for t in (normal(2, 5, 48), normal(2, 48, seed=1), normal(2, 48, seed=2)))
    expected = F.layer_norm(x, (48,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    assert torch.equal(fused.modulated_norm(x, shift, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_join_gelu(dtype: torch.dtype) -> None:
    attn, wide = normal(2, 5, 16).to(dtype), (normal(2, 5, 3 * 16 + 40, seed=1) * 3).to(dtype)
    mlp = wide[..., 48:]
    seen = fused.join_gelu(attn, mlp)
    assert (seen.dtype, seen.shape) == (dtype, (2, 5, 56))
    assert torch.equal(seen[..., :16], attn)
    v = mlp.double()
    expected = 0.5 * v * (1 + (math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)).tanh())
    assert (seen[..., 16:].double() - expected).abs().max() < torch.finfo(dtype).eps * expected.abs().max()


def test_dynamo_on_the_cpu_takes_the_plain_path() -> None:
    x, shift, scale = normal(2, 5, 48), normal(2, 48, seed=1), normal(2, 48, seed=2)
    compiled = torch.compile(fused.modulated_norm, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, shift, scale), fused.modulated_norm(x, shift, scale))
