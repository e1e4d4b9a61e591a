"""The Triton kernel for q/k norm and RoPE against plain PyTorch in fp32."""

from __future__ import annotations

import pytest
import torch

from trt_core.backends.check import relative_l2
from trt_core.flux import fused

pytest.importorskip("triton")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def wide_heads(tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Heads as a view of a wider product, as linear1's output holds them: strided over tokens."""
    generator = torch.Generator("cuda").manual_seed(seed)
    product = torch.randn(2, tokens, 3 * heads * dim + 16, generator=generator, device="cuda").to(dtype)
    return product[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "dim"), [(24, 128), (2, 128), (3, 32)])
@pytest.mark.parametrize(("txt_tokens", "img_tokens"), [(7, 33), (512, 100), (1, 1)])
def test_joint_norm_rope(dtype: torch.dtype, heads: int, dim: int, txt_tokens: int, img_tokens: int) -> None:
    from trt_core.flux import triton_kernels

    txt, img = wide_heads(txt_tokens, heads, dim, dtype, 1), wide_heads(img_tokens, heads, dim, dtype, 2)
    txt_scale, img_scale = (torch.randn(dim, device="cuda").to(dtype) for _ in range(2))
    pe = [torch.randn(n, dim // 2, device="cuda") for n in (txt_tokens, txt_tokens, img_tokens, img_tokens)]
    seen = triton_kernels.norm_rope(img, txt, img_scale, txt_scale, pe[2], pe[3], pe[0], pe[1], txt_tokens, fused.EPS)
    expected = fused.joint_norm_rope(txt.float(), img.float(), txt_scale.float(), img_scale.float(), *pe)
    assert seen.is_contiguous()
    assert relative_l2(seen, expected) < TOLERANCE[dtype]


def test_compiled_code_uses_the_kernel() -> None:
    """Inside `torch.compile` on a GPU the kernel runs, outside it does not."""
    fused.load_kernels()
    x = wide_heads(64, 2, 128, torch.bfloat16, 3)
    scale, cos, sin = torch.randn(128, device="cuda").bfloat16(), *torch.randn(2, 64, 64, device="cuda")
    names = []
    for function in (fused.norm_rope, torch.compile(fused.norm_rope, fullgraph=True)):
        function(x, scale, cos, sin)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function(x, scale, cos, sin)
            torch.cuda.synchronize()
        names.append(" ".join(event.key for event in profile.key_averages()))
    assert "norm_rope_kernel" not in names[0]
    assert "norm_rope_kernel" in names[1]
