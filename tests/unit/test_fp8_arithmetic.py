"""FP8 arithmetic against independent formulas: E4M3 numbers written out, products and sums in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trt_core.flux import cublaslt_library, fp8, fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def e4m3_numbers() -> Tensor:
    """Every finite E4M3 number from its definition: 3 bits of mantissa, exponents from -6 to 8, no inf."""
    small = [m / 8 * 2.0**-6 for m in range(8)]
    large = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    positive = torch.tensor((small + large)[:-1], dtype=torch.float64)
    return torch.cat((-positive.flip(0), positive[1:]))


def nearest_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 number to each fp64 value; ties go to the even mantissa, as everywhere in IEEE arithmetic."""
    numbers = e4m3_numbers()
    distance = (x.flatten()[:, None] - numbers).abs()
    mantissa_is_odd = (torch.arange(len(numbers)) - len(numbers) // 2).remainder(2)
    best = distance == distance.amin(1, keepdim=True)
    choice = torch.where(best, 1.0 + (1 - mantissa_is_odd), 0.0).argmax(1)
    return numbers[choice].reshape(x.shape)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ratio(seen: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return ((seen.double() - expected).norm() / expected.norm()).item()


def test_there_are_253_finite_numbers() -> None:
    assert len(e4m3_numbers()) == 253
    assert e4m3_numbers()[-1] == fp8.FP8_MAX == torch.finfo(fp8.FP8).max


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows_is_nearest_e4m3(dtype: torch.dtype) -> None:
    x = normal(2, 5, 48, dtype=dtype) * torch.logspace(-3, 3, 5)[None, :, None].to(dtype)
    q, scale = fp8.quantize_rows(x)
    assert (q.dtype, scale.dtype, scale.shape) == (fp8.FP8, torch.float32, (2, 5, 1))
    wide = x.double()
    assert torch.allclose(scale.double(), wide.abs().amax(-1, keepdim=True) / 448, rtol=1e-6)
    assert torch.equal(q.double(), nearest_e4m3((x.float() / scale).double()))
    assert q.float().abs().amax(-1).eq(448).all()


def test_quantize_tensor_clamps_and_rounds_to_even() -> None:
    scale = torch.tensor([0.5])
    x = torch.tensor([[0.0, 224.0, 225.0, -1e30, 8.5, 9.5, 2.0**-10, 1.5 * 2.0**-10, math.inf]])
    expected = [0.0, 448.0, 448.0, -448.0, 16.0, 20.0, 2.0**-9, 2.0**-9 * 2, 448.0]
    assert fp8.quantize_tensor(x, scale).tolist() == [expected]


def test_rows_of_zeros_stay_zero() -> None:
    q, scale = fp8.quantize_rows(torch.zeros(3, 16, dtype=torch.bfloat16))
    assert q.float().eq(0).all()
    assert scale.gt(0).all()
    assert torch.isfinite(1 / scale).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_the_product(bad: float) -> None:
    """A broken row must not come out as plausible numbers; the rows beside it stay as they are."""
    x = normal(4, 32)
    clean = fp8.quantize_rows(x)
    x[1, 3] = bad
    q, scale = fp8.quantize_rows(x)
    weight, weight_scale = fp8.quantize_rows(normal(16, 32, seed=1))
    out = fp8.scaled_linear(q, scale, weight, weight_scale, None, torch.bfloat16)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], fp8.scaled_linear(*clean, weight, weight_scale, None, torch.bfloat16)[[0, 2, 3]])


def test_nan_stays_nan_with_a_static_scale() -> None:
    x = normal(2, 16)
    x[0, 5] = math.nan
    assert fp8.quantize_tensor(x, torch.tensor([0.01])).isnan().nonzero().tolist() == [[0, 5]]


def test_an_outlier_ruins_its_own_row_only() -> None:
    x = normal(3, 64)
    alone = fp8.quantize_rows(x)
    x[1, 0] = 1e8
    q, scale = fp8.quantize_rows(x)
    assert q[1].float().tolist() == [448.0, *[0.0] * 63]
    for row in (0, 2):
        assert torch.equal(q[row].float(), alone[0][row].float())
        assert scale[row] == alone[1][row]


def test_the_largest_value_is_the_end_of_the_range() -> None:
    """448 * scale is exact for a power of two, and next to it nothing spills over into NaN."""
    x = torch.tensor([[448 * 2.0**-7, -448 * 2.0**-7, 1.0], [math.nextafter(3.3, 4), 3.3, -3.3]])
    q, scale = fp8.quantize_rows(x)
    assert scale[0].item() == 2.0**-7
    assert q.float().tolist() == [[448.0, -448.0, 128.0], [448.0, 448.0, -448.0]]


PRODUCERS = {
    "plain": (lambda a, m, scale: fp8.quantize(a, scale), lambda a, m: a),
    "gelu": (lambda a, m, scale: fp8.quantize_gelu(m, scale), lambda a, m: F.gelu(m, approximate="tanh")),
    "join": (
        lambda a, m, scale: fp8.quantize_join_gelu(a, m, scale),
        lambda a, m: torch.cat((a, F.gelu(m, approximate="tanh")), -1),
    ),
}


@pytest.mark.parametrize("name", PRODUCERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_producers(name: str, dtype: torch.dtype) -> None:
    """Each within E4M3's half step of the fp64 result, both with a given scale and with fresh ones."""
    produce, formula = PRODUCERS[name]
    attn, mlp = normal(2, 7, 24, dtype=dtype), normal(2, 9, 72, dtype=dtype, seed=1)[:, 2:, :40]
    expected = formula(attn.double(), mlp.double())
    given = torch.tensor([8 / 448])
    for input_scale in (None, given):
        q, scale = produce(attn, mlp, input_scale)
        assert q.dtype is fp8.FP8
        assert scale is given if input_scale is given else scale.shape == (2, 7, 1)
        step = expected.abs() / 16 + scale.double() * 2.0**-10 + expected.abs() * torch.finfo(dtype).eps
        assert ((q.double() * scale - expected).abs() <= step * 1.0001).all()


@pytest.mark.parametrize("static", [False, True])
def test_quantize_norm(static: bool) -> None:
    x, (shift, scale) = normal(2, 7, 48) * 3 + 1, normal(2, 2, 48, seed=1) * 0.3
    wide = x.double()
    expected = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + fused.EPS).sqrt()
    expected = expected * (1 + scale.double()[:, None]) + shift.double()[:, None]
    q, scales = fp8.quantize_norm(x, shift, scale, torch.tensor([6 / 448]) if static else None)
    assert ((q.double() * scales - expected).abs() <= expected.abs() / 15.9 + scales.double() * 2.0**-10).all()


def fake_quantized(x: Tensor, per_row: bool) -> Tensor:
    """What E4M3 keeps of `x`, in fp64."""
    wide = x.double()
    scale = (wide.abs().amax(-1, keepdim=True) if per_row else wide.abs().amax()) / 448
    return nearest_e4m3(wide / scale) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_linear(dtype: torch.dtype, per_row: bool, with_bias: bool) -> None:
    x, weight = normal(2, 5, 64, seed=2), normal(32, 64, seed=3) * torch.logspace(-2, 2, 32)[:, None]
    bias = normal(32, dtype=dtype, seed=4) if with_bias else None
    expected = fake_quantized(x, per_row) @ fake_quantized(weight, per_row).T
    if bias is not None:
        expected = expected + bias.double()
    q, q_scale = fp8.quantize(x, None if per_row else fp8.tensor_scale(x))
    seen = fp8.scaled_linear(q, q_scale, *fp8.merge_quantize(weight, None, 1.0, per_row=per_row), bias, dtype)
    assert (seen.dtype, seen.shape) == (dtype, (2, 5, 32))
    assert ratio(seen, expected) < torch.finfo(dtype).eps * 0.5 + 5e-7


@pytest.mark.parametrize("with_bias", [True, False])
def test_pictures_that_lie_apart(with_bias: bool) -> None:
    """The operator that a GPU takes for them, on the CPU: its sizes without computing, and the same numbers."""
    q, q_scale = fp8.quantize_rows(normal(2, 12, 32))
    weight, weight_scale = fp8.quantize_rows(normal(16, 32, seed=1))
    bias = normal(16, seed=2).bfloat16() if with_bias else None
    part, part_scale = q[:, 5:], q_scale[:, 5:].contiguous()
    seen = fp8.PRODUCT(part, part_scale, weight, weight_scale, bias)
    assert torch.equal(seen, fp8.scaled_linear(part, part_scale, weight, weight_scale, bias, torch.bfloat16))
    there = [None if x is None else x.to("meta") for x in (part, part_scale, weight, weight_scale, bias)]
    shaped = fp8.PRODUCT(*there)
    assert (shaped.shape, shaped.dtype, shaped.stride()) == (seen.shape, seen.dtype, seen.stride())


def test_products_are_pytorchs_without_cuda() -> None:
    if torch.version.cuda is None:
        assert cublaslt_library.why_not_loaded() == "this PyTorch has no CUDA"


def test_quantized_product_keeps_the_signal() -> None:
    """E4M3 on both sides costs 3.75 % of a product of normal numbers; a wrong scale or order would cost more."""
    x, weight = normal(64, 512, seed=5), normal(128, 512, seed=6)
    seen = fp8.scaled_linear(*fp8.quantize_rows(x), *fp8.quantize_rows(weight), None, torch.float32)
    assert 0.03 < ratio(seen, x.double() @ weight.double().T) < 0.045


def test_dynamic_tokens_compile_whole() -> None:
    """Dynamo takes the whole chain as one graph, and another number of tokens does not compile anew."""
    weight = fp8.merge_quantize(normal(32, 48), None, 1.0)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def chain(attn: Tensor, mlp: Tensor) -> Tensor:
        return fp8.scaled_linear(*fp8.quantize_join_gelu(attn, mlp, None), *weight, None, torch.bfloat16)

    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 9, 30):
        attn, mlp = normal(2, tokens, 16).bfloat16(), normal(2, tokens, 32, seed=1).bfloat16()
        assert torch.equal(compiled(attn, mlp), chain(attn, mlp))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [True, False])
def test_merge_quantize(dtype: torch.dtype, per_row: bool) -> None:
    base, delta = normal(24, 40, dtype=dtype, seed=7), normal(24, 40, seed=8)
    merged = base.double() - 0.07 * delta.double()
    weight, scale = fp8.merge_quantize(base, delta, -0.07, per_row=per_row)
    assert scale.shape == ((24, 1) if per_row else (1,))
    amax = merged.abs().amax(-1, keepdim=True) if per_row else merged.abs().amax().reshape(1)
    assert torch.allclose(scale.double(), amax / 448, rtol=1e-6)
    error = (weight.double() * scale - merged).abs()
    assert (error <= merged.abs() / 15.9 + scale.double() * 2.0**-10).all()


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("factor", [0.5, None])
def test_merge_quantize_writes_in_place_and_leaves_its_inputs(per_row: bool, factor: float | None) -> None:
    base, delta = normal(12, 16, seed=9), None if factor is None else normal(12, 16, seed=10)
    base_before, delta_before = base.clone(), None if delta is None else delta.clone()
    whole = torch.zeros(20, 16).to(fp8.FP8)
    out = (whole[4:16], torch.zeros((12, 1) if per_row else (1,)))
    seen = fp8.merge_quantize(base, delta, factor or 1.0, out, per_row=per_row)
    assert seen[0] is out[0]
    assert seen[1] is out[1]
    fresh = fp8.merge_quantize(base, delta, factor or 1.0, per_row=per_row)
    assert torch.equal(whole[4:16].view(torch.uint8), fresh[0].view(torch.uint8))
    assert torch.equal(out[1], fresh[1])
    assert whole[:4].float().eq(0).all()
    assert whole[16:].float().eq(0).all()
    assert torch.equal(base, base_before)
    assert delta is None or torch.equal(delta, delta_before)


def test_merging_nothing_equals_quantizing_the_base() -> None:
    base = normal(8, 32, dtype=torch.bfloat16, seed=11)
    expected = fp8.quantize_rows(base)
    for delta, factor in ((None, 1.0), (torch.zeros(8, 32), 3.0), (normal(8, 32), 0.0)):
        weight, scale = fp8.merge_quantize(base, delta, factor)
        assert torch.equal(weight.float(), expected[0].float())
        assert torch.equal(scale, expected[1])


def test_dequantize_rounds_once() -> None:
    weight, scale = fp8.merge_quantize(normal(8, 32, seed=12), None, 1.0)
    assert torch.equal(fp8.dequantize(weight, scale, torch.bfloat16), (weight.double() * scale).to(torch.bfloat16))
