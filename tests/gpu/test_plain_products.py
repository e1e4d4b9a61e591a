"""bf16 products by cuBLASLt without a workspace: PyTorch's error, whatever part of a tensor they read and write."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.products import kernel_names
from trt_core.backends.check import relative_l2
from trt_core.flux import cublaslt, fused

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
    fused._product(x, weight, bias[skipped:], out)
    exact = F.linear(x.float(), weight.float(), bias[skipped:].float())
    assert relative_l2(out, exact) < AS_CLOSE * relative_l2(F.linear(x, weight, bias[skipped:]), exact)
    fused._product(x, weight, None, out)
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


@pytest.mark.parametrize("workspace_bytes", [0, 32 << 20])
def test_other_kernels_compute_the_same(workspace_bytes: int) -> None:
    """cuBLASLt's further proposals, until there are no more; with a workspace they may split the sums."""
    room = torch.empty(workspace_bytes, dtype=torch.uint8, device=DEVICE) if workspace_bytes else None
    x, weight, bias = normal(4608, 1536), normal(3072, 1536, seed=1, size=1536**-0.5), normal(3072, seed=2)
    exact, own, tried = F.linear(x.float(), weight.float(), bias.float()), F.linear(x, weight, bias), 0
    out = torch.empty_like(own)
    while cublaslt.multiply_bf16(x, weight, bias, out.fill_(7), proposal=cublaslt.Proposal(tried, room)):
        assert relative_l2(out, exact) < AS_CLOSE * relative_l2(own, exact)
        tried += 1
    assert tried > 1
