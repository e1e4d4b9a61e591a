"""GELU in cuBLAS's epilogue on a GPU: its arithmetic, and compiled blocks that have no GELU of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Kind, kind_of
from benchmarks.products import kernel_names
from trt_core.backends.base import Request
from trt_core.backends.check import error_ratio, relative_l2
from trt_core.backends.inductor import InductorSegment
from trt_core.config import Attention, Profile
from trt_core.flux import fused
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.attention import attend, attention_function, beside_attention, runs
from trt_core.flux.catalogue import SegmentName, segment

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0)
HALVES = (torch.bfloat16, torch.float16)
BLOCKS = (SegmentName.DOUBLE_BLOCK, SegmentName.SINGLE_BLOCK)
ARCH = FluxArchitecture(
    in_channels=64, out_channels=64, hidden=512, heads=4, mlp_hidden=2048, double_depth=1, single_depth=1,
    context_dim=64, vec_dim=32, guidance=True, axes_dim=(16, 56, 56),
)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("first_row", "first_column"), [(0, 0), (1536, 0), (0, 512)])
def test_gelu_product(dtype: torch.dtype, first_row: int, first_column: int) -> None:
    """As close to fp32 as GELU of a rounded product, also for a part of a weight; one compilation, one kernel."""
    weight = (normal(2048 + first_row, 512 + first_column, seed=1) * 512**-0.5).to(dtype)[first_row:, first_column:]
    bias = normal(2048 + first_row, seed=2).to(dtype)[first_row:]
    compiled = torch.compile(fused.gelu_product, fullgraph=True)
    for tokens in (257, 64, 1000):
        x = normal(2, tokens, 512, seed=3).to(dtype) * 2
        torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad(), torch.compiler.set_stance("default" if tokens == 257 else "fail_on_recompile"):
            seen = compiled(x, weight, bias)
        expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
        assert (seen.dtype, seen.shape) == (dtype, expected.shape)
        assert relative_l2(seen, expected) < 1.2 * relative_l2(fused.gelu_product(x, weight, bias), expected)
    with torch.no_grad():
        names = kernel_names(compiled, x, weight, bias)
    assert [kind_of(name) for name in names] == [Kind.GEMM], names


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_blocks(name: SegmentName, dtype: torch.dtype) -> None:
    """Inside the plan's error bound, for one and for two pictures, and at other sizes."""
    described, reference = segment(name, ARCH, attend), segment(name, ARCH, attend).function
    for batch in (1, 2):
        asked = Request(described, dtype, DEVICE, Profile.around(batch, 512, 64), reference)
        compiled = InductorSegment(asked)
        assert error_ratio(compiled, asked) < 1.5
        inputs = described.random_inputs(batch, 300, 20, dtype, DEVICE)
        exact = reference(*(tensor.float() for tensor in inputs))
        for s, own, e in zip(compiled(*inputs), reference(*inputs), exact, strict=True):
            assert torch.isfinite(s).all()
            assert relative_l2(s, e) < 1.5 * relative_l2(own, e)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_compiled_block_has_no_gelu_of_its_own(name: SegmentName) -> None:
    """At FLUX's own sizes: not even as a part of the kernel that joins it with attention's output."""
    arch = FluxArchitecture(
        in_channels=64, out_channels=64, hidden=3072, heads=24, mlp_hidden=12288, double_depth=1, single_depth=1,
        context_dim=64, vec_dim=32, guidance=True, axes_dim=(16, 56, 56),
    )  # fmt: skip
    chosen = next(k for k in (Attention.CUDNN, Attention.FLASH) if runs(k, torch.bfloat16, DEVICE, 24, 128))
    described = segment(name, arch, attention_function(chosen))
    profile = Profile.around(1, 1024, 512)
    compiled = InductorSegment(Request(described, torch.bfloat16, DEVICE, profile, described.function))
    inputs = described.random_inputs(1, 1024, 512, torch.bfloat16, DEVICE)
    with torch.no_grad():
        names = kernel_names(compiled, *inputs)
    assert not [kernel for kernel in names if kind_of(kernel) is Kind.GELU]


@pytest.mark.parametrize("kernel", [Attention.CUDNN, Attention.FLASH, Attention.FLASH3])
def test_a_product_beside_attention(kernel: Attention) -> None:
    """Several pictures: inside the plan's error bound, without a GELU kernel, and the same bits from a CUDA graph."""
    if not runs(kernel, torch.bfloat16, DEVICE, 4, 128):
        pytest.skip(f"{kernel.value} does not run here")
    name = SegmentName.SINGLE_BLOCK
    described = segment(name, ARCH, attention_function(kernel), beside=beside_attention(kernel))
    reference = segment(name, ARCH, attend).function
    asked = Request(described, torch.bfloat16, DEVICE, Profile.around(2, 1024, 512), reference)
    compiled = InductorSegment(asked)
    with torch.no_grad():
        assert error_ratio(compiled, asked) < 1.5
        inputs = described.random_inputs(3, 1024, 512, torch.bfloat16, DEVICE)
        seen, names = compiled(*inputs), kernel_names(compiled, *inputs)
        for _ in range(5):
            assert all(torch.equal(s, again) for s, again in zip(seen, compiled(*inputs), strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(*inputs)
        for out in captured:
            out.zero_()
        graph.replay()
    assert all(torch.equal(s, again) for s, again in zip(seen, captured, strict=True))
    assert not [kernel for kernel in names if kind_of(kernel) is Kind.GELU]
