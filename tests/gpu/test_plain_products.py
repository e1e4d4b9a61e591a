"""bf16 products by cuBLASLt without a workspace: PyTorch's error, whatever part of a tensor they read and write."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.products import kernel_names
from trt_core.backends.check import relative_l2
from trt_core.flux import cublaslt, cublaslt_kernels, fused
from trt_core.flux.cublaslt_kernels import OWN, Kernel
from trt_core.flux.products import Product
from trt_core.kernel_ranking import ProductInputs, candidates, measure

DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
AS_CLOSE = 1.01
"""Of PyTorch's own error: sums in another order are rounded to bf16 as well."""


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE) * size).to(BF16)


@pytest.fixture(autouse=True)
def _only_where_it_is_used() -> None:
    reason = cublaslt.why_not(0)
    if torch.cuda.get_device_capability() == (9, 0):
        assert reason is None
    elif reason:
        pytest.skip(reason)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(4608, 3072, 3072), (512, 9216, 3072), (1, 64, 64), (77, 40, 136), (20000, 48, 160)]
)
def test_as_close_as_pytorchs(rows: int, columns: int, width: int, gelu: bool) -> None:
    x, weight, bias = normal(1, rows, width), normal(columns, width, seed=1, size=width**-0.5), normal(columns, seed=2)
    compiled = torch.compile(fused.gelu_product if gelu else fused.plain_product, fullgraph=True)
    own, exact = F.linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float())
    if gelu:
        own, exact = F.gelu(own, approximate="tanh"), F.gelu(exact, approximate="tanh")
    seen = compiled(x, weight, bias)
    assert (seen.dtype, seen.shape, seen.is_contiguous()) == (BF16, own.shape, True)
    assert relative_l2(seen, exact) < AS_CLOSE * relative_l2(own, exact)
    names = kernel_names(compiled, x, weight, bias)
    assert len(names) == 1, names


@pytest.mark.parametrize("skipped", [0, 1, 2, 4, 8, 16, 64, 512])
def test_parts_of_tensors(skipped: int) -> None:
    """Columns that begin anywhere, aligned or not: rows, weight and result are parts, and the rest stays as it was."""
    x, weight = normal(300, 256 + skipped)[:, skipped:], normal(384 + skipped, 512, seed=1)[skipped:, -256:]
    whole, bias = torch.full((320, 384 + skipped), 7.0, device=DEVICE, dtype=BF16), normal(384 + skipped, seed=2)
    out = whole[20:, skipped:]
    fused.write_product(x, weight, bias[skipped:], out)
    exact = F.linear(x.float(), weight.float(), bias[skipped:].float())
    assert relative_l2(out, exact) < AS_CLOSE * relative_l2(F.linear(x, weight, bias[skipped:]), exact)
    fused.write_product(x, weight, None, out)
    assert relative_l2(out, exact + x.float() @ weight.float().T) < 4e-3
    assert (whole[:20] == 7).all()
    assert (whole[:, :skipped] == 7).all()


def test_both_parts_of_a_joined_product(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, mlp = normal(1, 1000, 512), normal(1, 1000, 2048, seed=1)
    weight, bias = normal(512, 2560, seed=2, size=2560**-0.5), normal(512, seed=3)
    exact = F.linear(torch.cat((attn, mlp), -1).float(), weight.float(), bias.float())
    seen = fused.joined_product(attn, mlp, weight, bias)
    names = kernel_names(fused.joined_product, attn, mlp, weight, bias)
    assert not [name for name in names if re.search("memset|copy", name, re.IGNORECASE)]
    monkeypatch.setattr(cublaslt, "why_not", lambda index: "as if it were another GPU")
    assert relative_l2(seen, exact) < AS_CLOSE * relative_l2(fused.joined_product(attn, mlp, weight, bias), exact)


def test_in_a_cuda_graph() -> None:
    x, weight, bias = normal(1, 600, 256), normal(384, 256, seed=1), normal(384, seed=2)
    fused._PLAIN_PRODUCT(x, weight, bias, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused._PLAIN_PRODUCT(x, weight, bias, True)
    for seed in (3, 4):
        x.copy_(normal(1, 600, 256, seed=seed))
        graph.replay()
        assert torch.equal(captured, fused._PLAIN_PRODUCT(x, weight, bias, True))


PRODUCTS = [
    Product(rows, 3072, width, fp8, gelu, onto)
    for rows, width in ((4608, 1536), (4096, 1040), (512, 3072), (77, 256))
    for fp8, gelu, onto in ((False, False, False), (False, True, False), (False, False, True), (True, False, False))
]


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_all_kernels_compute_the_same_bits(product: Product) -> None:
    """Those that a plan may choose: at least one of them can, and none splits the sums."""
    inputs, tried = ProductInputs(product, DEVICE), 0
    before = inputs.out.clone()
    assert inputs.run(OWN)
    expected = inputs.out.clone()
    for kernel in candidates(product):
        inputs.out.copy_(before if product.onto else torch.full_like(before, 7))
        if inputs.run(kernel):
            assert torch.equal(inputs.out, expected), kernel.words()
            tried += 1
    assert tried > 0


@pytest.mark.parametrize("product", [Product(4608, 3072, 3072), Product(4608, 3072, 3072, fp8=True)], ids=str)
def test_a_preferred_kernel_is_taken(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt_kernels, "_PREFERRED", {})
    inputs = ProductInputs(product, DEVICE)
    own = kernel_names(lambda: inputs.run(OWN))
    liked = next(k for k in candidates(product) if inputs.run(k) and f"_{k.tile}_" not in own[0])
    cublaslt_kernels.prefer(0, {product: liked})
    (name,) = kernel_names(lambda: inputs.run(None))
    assert f"_{liked.tile}_" in name
    assert kernel_names(lambda: inputs.run(OWN)) == own
    cublaslt_kernels.prefer(0, {product: Kernel("280x128", "1x1", 1)})
    assert kernel_names(lambda: inputs.run(None)) == own, "a tile too large for one group of warps"


@pytest.mark.parametrize("skipped", [0, 1, 2, 4, 8])
def test_preferred_kernels_take_no_odd_addresses(skipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs are multiples of 16 bytes, as are the rows' distances; everything else is cuBLASLt's choice."""
    monkeypatch.setattr(cublaslt_kernels, "_PREFERRED", {})
    cublaslt_kernels.prefer(0, {Product(300, 384, 256): Kernel("128x128", "2x1", 1)})
    test_parts_of_tensors(skipped)


def test_halves_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures by the kernel that was measured for one: the same bits in two launches."""
    monkeypatch.setattr(cublaslt_kernels, "_PREFERRED", {})
    x, weight, bias = normal(2, 4608, 512), normal(1024, 512, seed=1, size=512**-0.5), normal(1024, seed=2)
    expected = fused._PLAIN_PRODUCT(x, weight, bias, True)
    cublaslt_kernels.prefer(0, {Product(4608, 1024, 512, gelu=True): Kernel("128x160", "2x1", 1)})
    assert torch.equal(fused._PLAIN_PRODUCT(x, weight, bias, True), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fused._PLAIN_PRODUCT(x, weight, bias, True)
        torch.cuda.synchronize()
    (found,) = [event for event in profile.key_averages() if "128x160" in event.key]
    assert found.count == 2


def test_a_ranking_takes_what_settles_faster() -> None:
    product = Product(4608, 12288, 3072, gelu=True)
    times = measure(product, DEVICE, 50, 50)
    assert OWN in times
    assert len(times) > 1
    least_ms = product.flops / 1e12
    assert all(least_ms < ms < 20 * least_ms for ms in times.values()), "faster than any Hopper GPU, or not measured"
