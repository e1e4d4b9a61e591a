"""GELU inside the product before it: where it is used, what it computes, and blocks that are cut for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from tests.unit.tiny_flux import bfl_weights, shapes_of, tiny_transformer
from trt_core.backends.base import Request
from trt_core.backends.check import relative_l2
from trt_core.backends.inductor import InductorSegment
from trt_core.config import Attention, Profile
from trt_core.flux import attention as attention_kernels
from trt_core.flux import fused, segments
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.attention import attend, attention_function, beside_attention
from trt_core.flux.catalogue import SegmentName, segment
from trt_core.flux.precision import Precision

CPU = torch.device("cpu")
BLOCKS = (SegmentName.DOUBLE_BLOCK, SegmentName.SINGLE_BLOCK)
HALVES = (torch.bfloat16, torch.float16)
EXACT_GELU = 2e-3
"""How far the exact GELU, which PyTorch's CPU kernel of `_addmm_activation` computes, is from the tanh form at most."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product_of(x: Tensor, out: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and a bias, both parts of larger ones."""
    weight = normal(out + 3, x.shape[-1] + 8, seed=seed).to(x.dtype)[3:, 8:] * x.shape[-1] ** -0.5
    return x, weight, normal(out + 3, seed=seed + 1).to(x.dtype)[3:]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


@pytest.fixture(scope="module")
def arch() -> FluxArchitecture:
    return FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer(double=1, single=1, head_dim=16))))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are cut as on a GPU; the products themselves stay plain."""
    monkeypatch.setattr(segments, "has_gelu_epilogue", lambda x: True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(7, 48), (1, 5, 48), (2, 5, 48)])
def test_plain_product(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = product_of(normal(*shape).to(dtype), 40)
    seen = fused.gelu_product(x, weight, bias)
    assert (seen.dtype, seen.shape) == (dtype, (*shape[:-1], 40))
    assert torch.equal(seen, F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    expected = gelu(x.double() @ weight.double().T + bias.double())
    assert relative_l2(seen, expected) < 2 * torch.finfo(dtype).eps


def test_only_inside_inductors_code_on_a_gpu_and_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = {dtype: SimpleNamespace(is_cuda=True, dtype=dtype) for dtype in (torch.float32, *HALVES)}
    assert not any(fused.has_gelu_epilogue(x) for x in on_gpu.values()), "eager"
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert [fused.has_gelu_epilogue(x) for x in on_gpu.values()] == [False, True, True]
    assert not fused.has_gelu_epilogue(SimpleNamespace(is_cuda=False, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", BLOCKS)
def test_dynamo_on_the_cpu_takes_the_plain_path(name: SegmentName, arch: FluxArchitecture) -> None:
    described = segment(name, arch, attend)
    inputs = described.random_inputs(2, 24, 8, torch.bfloat16, CPU)
    called: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        called.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    seen = torch.compile(described.function, fullgraph=True, backend=backend)(*inputs)
    assert any("gelu" in target for target in called)
    assert not any("addmm" in target or "accumulated" in target for target in called)
    for s, e in zip(seen, described.function(*inputs), strict=True):
        # Compiled, the norms of q and k stay in fp32 until after RoPE.
        assert relative_l2(s, e) < torch.finfo(torch.bfloat16).eps


def test_the_epilogues_product_keeps_shapes_and_every_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_addmm_activation` itself, through Inductor, which must not take it apart."""
    monkeypatch.setattr(fused, "has_gelu_epilogue", lambda x: True)

    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused.gelu_product(x * 2, weight, bias) + 1

    compiled = torch.compile(product, fullgraph=True)
    weight, bias = product_of(normal(1, 48), 40)[1:]
    code = ""
    for batch, tokens in ((2, 5), (2, 9), (3, 4)):
        x = normal(batch, tokens, 48)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if code else "default"):
            if code:
                seen = compiled(x, weight, bias)
            else:
                seen, (code,) = run_and_get_code(compiled, x, weight, bias)
        assert seen.shape == (batch, tokens, 40)
        assert relative_l2(seen, gelu((x * 2) @ weight.T + bias) + 1) < EXACT_GELU
    assert "torch.ops.aten._addmm_activation" in code


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_joined_product(dtype: torch.dtype) -> None:
    """Off by about as much as the whole product is by its one rounding; a part is rounded twice."""
    attn, mlp = normal(2, 33, 64).to(dtype), normal(2, 33, 256, seed=5).to(dtype)
    _, weight, bias = product_of(torch.cat((attn, mlp), -1), 48)
    expected = torch.cat((attn, mlp), -1).double() @ weight.double().T + bias.double()
    whole = relative_l2(F.linear(torch.cat((attn, mlp), -1), weight, bias), expected)
    seen = fused.joined_product(attn, mlp, weight, bias)
    assert seen.shape == (2, 33, 48)
    assert seen.dtype is dtype
    assert relative_l2(seen, expected) < max(1.5 * whole, 1e-6)


def test_accumulated_product_is_an_operator() -> None:
    attn, mlp = normal(2, 5, 16), normal(2, 5, 40, seed=1)
    arguments = (attn, mlp, normal(24, 56, seed=2), normal(24, seed=3))
    torch.library.opcheck(fused._ACCUMULATED_PRODUCT, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("gelu", [False, True])
def test_plain_product_is_an_operator(gelu: bool) -> None:
    x, weight, bias = product_of(normal(2, 5, 16), 24)
    torch.library.opcheck(fused._PLAIN_PRODUCT, (x, weight, bias, gelu), test_utils=("test_schema", "test_faketensor"))
    expected = F.linear(x, weight, bias)
    seen = fused._PLAIN_PRODUCT(x, weight, bias, gelu)
    assert relative_l2(seen, F.gelu(expected, approximate="tanh") if gelu else expected) < (
        EXACT_GELU if gelu else 1e-6
    )


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", BLOCKS)
def test_cut_blocks_are_the_same_blocks(
    name: SegmentName, arch: FluxArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager and by Inductor, one compilation for batch 1 and one for all others, whatever the tokens."""
    described = segment(name, arch, attend)
    compiled = InductorSegment(Request(described, torch.float32, CPU, Profile.around(1, 40, 7), described.function))
    counts = []
    for batch, img in ((1, 40), (1, 24), (2, 40), (3, 16)):
        inputs = described.random_inputs(batch, img, 7, torch.float32, CPU)
        with monkeypatch.context() as plain:
            plain.setattr(segments, "has_gelu_epilogue", fused.has_gelu_epilogue)
            expected = described.function(*inputs)
        before = counters["stats"]["unique_graphs"]
        for seen in (described.function(*inputs), compiled(*inputs)):
            for s, e in zip(seen, expected, strict=True):
                assert relative_l2(s, e) < 1e-6
        counts.append(counters["stats"]["unique_graphs"] - before)
    assert counts == [1, 0, 1, 0]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("name", "mlps"), [(BLOCKS[0], 2), (BLOCKS[1], 1)])
def test_the_first_product_of_each_mlp_carries_the_gelu(
    name: SegmentName, mlps: int, arch: FluxArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = fused.gelu_product
    monkeypatch.setattr(segments, "gelu_product", lambda x, w, b: seen.append(w) or real(x, w, b))
    for gone in ("gelu_linear", "join_gelu_linear"):
        monkeypatch.setattr(segments, gone, None)
    described = segment(name, arch, attend)
    inputs = described.random_inputs(1, 24, 8, torch.float32, CPU)
    described.function(*inputs)
    assert [tuple(w.shape) for w in seen] == [(arch.mlp_hidden, arch.hidden)] * mlps
    assert all(any(w.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in inputs) for w in seen)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("kernel", "second_products"), [(Attention.MATH, 0), (Attention.FLASH3, 3)])
def test_a_product_beside_attention(
    kernel: Attention, second_products: int, arch: FluxArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same block, by Inductor as well; FlashAttention-3's output and the MLP's are one tensor, multiplied once."""
    beside, calls, wholes = beside_attention(kernel), [], []
    noted = lambda *tensors: calls.append(tensors[3].shape[0]) or beside(*tensors)  # noqa: E731
    linear = segments.linear
    noted_linear = lambda x, w, b: wholes.append(w.shape[1] > 3 * arch.hidden) or linear(x, w, b)  # noqa: E731
    name, attention = SegmentName.SINGLE_BLOCK, attention_function(kernel)
    described, plain = segment(name, arch, attention, beside=noted), segment(name, arch, attend).function
    asked = segment(name, arch, attention, beside=beside)
    compiled = InductorSegment(Request(asked, torch.float32, CPU, Profile.around(1, 40, 7), asked.function))
    for batch in (1, 2, 3):
        inputs = described.random_inputs(batch, 24, 7, torch.float32, CPU)
        with monkeypatch.context() as whole:
            whole.setattr(segments, "has_gelu_epilogue", fused.has_gelu_epilogue)
            expected = plain(*inputs)
        with monkeypatch.context() as counted:
            counted.setattr(segments, "linear", noted_linear)
            eager = described.function(*inputs)
        for seen in (eager, compiled(*inputs)):
            for s, e in zip(seen, expected, strict=True):
                assert relative_l2(s, e) < 1e-6
    assert (calls, sum(wholes)) == ([1, 2, 3], second_products)
    assert beside_attention(Attention.AUTO) is beside_attention(Attention.FP8) is None


def test_attention_beside_a_product_is_an_operator() -> None:
    q, k, v = (normal(2, 8, 3, 16, seed=s) for s in range(3))
    arguments = (q, k, v, normal(2, 8, 48, seed=4), normal(96, 48, seed=5), normal(96, seed=6), "math")
    torch.library.opcheck(attention_kernels._BESIDE, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(attention_kernels._JOINED, arguments[:-1], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("layers", [{"img_mlp.0", "txt_mlp.2"}, {"linear1"}, {"linear2"}])
def test_fp8_weights_keep_their_own_path(
    layers: set[str], arch: FluxArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both weights of a GELU have to be plain: what an FP8 product reads is quantized from GELU's own result."""
    monkeypatch.setattr(segments, "gelu_product", None)
    name = BLOCKS["linear1" in layers or "linear2" in layers]
    described = segment(name, arch, attend, Precision(frozenset(layers)))
    inputs = described.random_inputs(1, 24, 8, torch.float32, CPU)
    seen = described.function(*inputs)
    monkeypatch.setattr(segments, "has_gelu_epilogue", lambda x: False)
    for s, e in zip(seen, described.function(*inputs), strict=True):
        assert torch.equal(s, e)
