"""Attention in E4M3 on a GPU: our kernels against plain arithmetic, cuDNN against the reference, compiled blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.sums import added
from trt_core.backends.base import Request
from trt_core.backends.check import error_ratio, relative_l2
from trt_core.backends.inductor import InductorSegment
from trt_core.config import Profile
from trt_core.flux import cudnn_attention, fp8_attention, fused
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.attention import attend
from trt_core.flux.catalogue import SegmentName, segment
from trt_core.flux.fp8 import FP8, quantize_rows
from trt_core.flux.fp8_attention import QkvStream, ValueSource, attend_fp8, quantized_qkv
from trt_core.flux.precision import Precision

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0)
needs_cudnn = pytest.mark.skipif(
    not cudnn_attention.installed() or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs nvidia-cudnn-frontend and compute capability 9.0",
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def stream(tokens: int, heads: int, dim: int, seed: int, dtype: torch.dtype, extra: int = 0) -> QkvStream:
    """Strided products of two pictures, v as large as its source makes it."""
    hidden = heads * dim
    qkv, source = normal(2, tokens + 2, 3 * hidden + extra, seed=seed), value_source(hidden, seed + 4, dtype)
    x = F.layer_norm(normal(2, tokens + 2, hidden, seed=seed + 8), (hidden,), eps=1e-6)
    x = x * (1 + source.scale[:, None].float()) + source.shift[:, None].float()
    matrix = source.weight.float() * (1 if source.weight_scale is None else source.weight_scale)
    qkv[..., 2 * hidden : 3 * hidden] = x @ matrix.T + source.bias.float()
    norms = ((1 + 0.1 * normal(dim, seed=seed + s)).to(dtype) for s in (1, 2))
    angle = normal(tokens, dim // 2, seed=seed + 3)
    return QkvStream(qkv.to(dtype)[:, 2:], *norms, angle.cos(), angle.sin(), source)


def value_source(hidden: int, seed: int, dtype: torch.dtype) -> ValueSource:
    """With one scale, one for each row, or none: by the seed."""
    shift, scale, bias = (0.5 * normal(2, hidden, seed=seed + s).to(dtype) for s in range(3))
    wide = normal(3 * hidden, hidden, seed=seed + 5)[2 * hidden :]
    weight, weight_scale = [
        (wide.to(dtype), None), quantize_rows(wide), (wide.to(FP8), torch.full((1,), 3.0, device=DEVICE)),
    ][seed % 3]  # fmt: skip
    return ValueSource(shift, scale, weight, weight_scale, bias[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "dim"), [(24, 128), (3, 32)])
@pytest.mark.parametrize("txt_tokens", [0, 1, 37])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_quantized_qkv(dtype: torch.dtype, heads: int, dim: int, txt_tokens: int, seed: int) -> None:
    """Equal to the plain arithmetic but for neighbours in E4M3, where a number sits on the edge between two."""
    from trt_core.flux import triton_attention

    img = stream(61, heads, dim, seed, dtype, extra=16)
    txt = stream(txt_tokens, heads, dim, seed + 10, dtype) if txt_tokens else None
    seen = triton_attention.quantized_qkv(img, txt, heads, fused.EPS)
    expected = quantized_qkv(img, txt, heads)
    assert torch.equal(seen.scale, expected.scale)
    assert float(seen.factor) == pytest.approx(float(expected.factor), rel=1e-4)
    assert 2 < float(seen.factor) < 60, "the bound is far above v, or below it"
    for s, e in zip(seen[:3], expected[:3], strict=True):
        assert (s.dtype, s.shape, s.is_contiguous()) == (FP8, e.shape, True)
        steps = (s.view(torch.uint8).int() - e.view(torch.uint8).int()).abs()
        assert steps[e.float().abs() > 2.0**-8].max() <= 1
        assert (steps > 0).float().mean() < 5e-3


@needs_cudnn
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [64, 257, 1536])
@pytest.mark.parametrize("factor", [1.0, 12.0])
def test_cudnn_is_the_reference(batch: int, tokens: int, factor: float) -> None:
    q, k, v = (normal(batch, tokens, 24, 128, seed=s).to(FP8) for s in range(3))
    times = torch.full((1,), factor, device=DEVICE)
    seen, expected = (f(q, k, v, times).float() for f in (cudnn_attention.attend, fp8_attention.reference))
    exact = attend(q.float(), k.float(), v.float()).unflatten(-1, (24, 128)) * factor
    assert relative_l2(seen, exact) < 1.2 * relative_l2(expected, exact) < 0.06
    assert relative_l2(seen, expected) < 0.05


@needs_cudnn
@pytest.mark.parametrize("name", [SegmentName.DOUBLE_BLOCK, SegmentName.SINGLE_BLOCK])
@pytest.mark.parametrize("static", [False, True])
def test_compiled_blocks(name: SegmentName, static: bool) -> None:
    """Inside the plan's error bound, for one and for two pictures; other tokens need no compilation."""
    arch = FluxArchitecture(
        in_channels=64, out_channels=64, hidden=512, heads=4, mlp_hidden=2048, double_depth=1, single_depth=1,
        context_dim=64, vec_dim=32, guidance=True, axes_dim=(16, 56, 56),
    )  # fmt: skip
    kinds = {"img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "linear1", "linear2"}
    layers = frozenset(kinds | {k.replace("img", "txt") for k in kinds})
    names = {item.name.rpartition(".")[0] for item in segment(name, arch, attend).weights}
    precision = Precision(layers & names, static=static)
    described = segment(name, arch, attend_fp8, precision)
    reference = segment(name, arch, attend, precision).function
    for batch in (1, 2):
        asked = Request(described, torch.bfloat16, DEVICE, Profile.around(batch, 512, 64), reference, precision)
        compiled = InductorSegment(asked)
        assert error_ratio(compiled, asked) < 1.5
        inputs = described.random_inputs(batch, 300, 20, torch.bfloat16, DEVICE)
        for s, e in zip(added(compiled(*inputs)), added(reference(*inputs)), strict=True):
            assert torch.isfinite(s.float()).all()
            assert relative_l2(s, e) < 0.05
