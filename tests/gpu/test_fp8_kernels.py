"""The FP8 Triton kernels against the plain arithmetic of `fp8`, which the unit tests hold against fp64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trt_core.backends.check import relative_l2
from trt_core.flux import cublaslt, fp8, fused, storage
from trt_core.flux.open_sum import OpenSum

pytest.importorskip("triton")
DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8 below 8.9"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = [(48, 160), (64, 256), (3072, 12288)]
SCALES = [None, 0.02]


@pytest.fixture
def rows() -> ModuleType:
    from trt_core.flux import triton_rows

    return triton_rows


@pytest.fixture
def weights() -> ModuleType:
    from trt_core.flux import triton_weights

    return triton_weights


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def given(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor([value], device=DEVICE)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8).cpu()


def assert_same(seen: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal but for values that sit on the edge between two E4M3 numbers: one in a thousand may be its neighbour."""
    (q, scale), (expected_q, expected_scale) = seen, expected
    assert (q.dtype, q.shape, scale.shape) == (fp8.FP8, expected_q.shape, expected_scale.shape)
    assert q.is_contiguous()
    assert torch.allclose(scale, expected_scale, rtol=2e-6)
    # E4M3 bit patterns of one sign are in the order of their values.
    steps = (bits(q).int() - bits(expected_q).int()).abs()
    both_tiny = (q.float().abs() < 2.0**-8).cpu() & (expected_q.float().abs() < 2.0**-8).cpu()
    assert steps[~both_tiny].max() <= 1
    assert (steps > 0).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [48, 3072, 15360])
def test_quantize(rows: ModuleType, dtype: torch.dtype, scale: float | None, width: int) -> None:
    x = normal(2, 9, width, dtype=dtype)[:, 2:]
    assert_same(rows.quantize_fp8(x, given(scale)), fp8.quantize(x, given(scale)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [48, 3072, 15360])
def test_quantize_norm(rows: ModuleType, dtype: torch.dtype, scale: float | None, width: int) -> None:
    x, mod = normal(2, 9, width, dtype=dtype)[:, 2:] * 3 + 1, normal(2, 2, width, dtype=dtype, seed=1) * 0.3
    seen = rows.modulated_norm_fp8(x, mod[0], mod[1], fused.EPS, given(scale))
    assert_same(seen, fp8.quantize_norm(x.float(), mod[0].float(), mod[1].float(), given(scale)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [48, 3072])
def test_quantize_gated_norm(rows: ModuleType, dtype: torch.dtype, scale: float | None, width: int) -> None:
    """The sum rounded as without quantization, and the norm of that sum."""
    x, mod = normal(2, 9, width, dtype=dtype)[:, 2:] * 3 + 1, normal(3, 2, width, dtype=dtype, seed=1) * 0.3
    stream = OpenSum(x, normal(2, 7, width, dtype=dtype, seed=2), mod[2])
    total, seen = rows.gated_norm_fp8(stream, mod[0], mod[1], fused.EPS, given(scale))
    assert torch.equal(total, rows.gated_norm(stream, mod[0], mod[1], fused.EPS)[0])
    assert_same(seen, fp8.quantize_norm(total.float(), mod[0].float(), mod[1].float(), given(scale)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("hidden", "mlp_hidden"), WIDTHS)
def test_gelu_and_join(rows: ModuleType, dtype: torch.dtype, scale: float | None, hidden: int, mlp_hidden: int) -> None:
    attn = normal(2, 9, hidden, dtype=dtype)[:, 2:]
    mlp = normal(2, 7, 3 * hidden + mlp_hidden, dtype=dtype, seed=1)[..., 3 * hidden :]
    expected = fp8.quantize_join_gelu(attn.float(), mlp.float(), given(scale))
    assert_within_gelu(rows.join_gelu_fp8(attn, mlp, given(scale)), expected, mlp, hidden)
    assert_within_gelu(rows.gelu_fp8(mlp, given(scale)), fp8.quantize_gelu(mlp.float(), given(scale)), mlp, 0)


@pytest.mark.parametrize("scale", SCALES)
def test_quantize_join_gelu_of_attention_that_is_fp8(rows: ModuleType, scale: float | None) -> None:
    attn, attn_scale = normal(2, 9, 3072, seed=3).mul_(100).to(fp8.FP8)[:, 2:], given(0.031)
    mlp = normal(2, 7, 12288, dtype=torch.bfloat16, seed=1)
    expected = fp8.quantize_join_gelu(attn, mlp.float(), given(scale), attn_scale)
    assert_within_gelu(rows.join_gelu_fp8(attn, mlp, given(scale), attn_scale), expected, mlp, 3072)


def assert_within_gelu(seen: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], mlp: Tensor, hidden: int) -> None:
    """As `assert_same`, plus what the GPU's tanh is off by: 2 ** -11 of half of GELU's input, before it is rounded."""
    (q, scale), (expected_q, expected_scale) = seen, expected
    assert (q.dtype, q.shape, scale.shape) == (fp8.FP8, expected_q.shape, expected_scale.shape)
    assert torch.allclose(scale, expected_scale, rtol=1e-3)
    off = torch.zeros_like(q, dtype=torch.float32)
    off[..., hidden:] = mlp.float().abs() * 2.0**-12 / expected_scale
    one_step = expected_q.float().abs() / 8 + 2.0**-9
    assert ((q.float() - expected_q.float()).abs() <= one_step + 1.01 * off).all()
    assert (bits(q) != bits(expected_q)).float().mean() < 0.02
    assert relative_l2(q.float() * scale, expected_q.float() * expected_scale) < 4e-3


def test_zeros_nan_and_outliers(rows: ModuleType) -> None:
    """As the plain arithmetic: a row of zeros is zeros, a row with NaN is NaN, clamped values are 448."""
    x = normal(1, 4, 256)
    x[0, 0], x[0, 1, 7], x[0, 2, 7] = 0.0, float("nan"), 1e9
    (q, scale), (expected, expected_scale) = rows.quantize_fp8(x, None), fp8.quantize(x, None)
    assert torch.equal(q.float().isnan(), expected.float().isnan())
    assert torch.allclose(scale, expected_scale, rtol=2e-6, equal_nan=True)
    assert torch.equal(q.float()[0, [0, 2]], expected.float()[0, [0, 2]])
    static = rows.quantize_fp8(x, given(0.02))[0].float()
    assert static.isnan().nonzero().tolist() == [[0, 1, 7]]
    assert static[0, 2, 7] == fp8.FP8_MAX


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 3072, 15360])
@pytest.mark.parametrize("with_delta", [True, False])
def test_merge_has_the_bits_of_plain_pytorch(
    weights: ModuleType, dtype: torch.dtype, width: int, with_delta: bool
) -> None:
    base = normal(33, width, dtype=dtype) * torch.logspace(-6, 4, 33, device=DEVICE)[:, None].to(dtype)
    delta = normal(33, width, seed=1) if with_delta else None
    base[3] = 0
    whole, scale = torch.zeros(40, width, device=DEVICE).to(fp8.FP8), torch.zeros(40, 1, device=DEVICE)
    weights.merge_quantize_rows(base, delta, 0.3, whole[5:38], scale[5:38])
    expected = fp8.merge_quantize(base.cpu(), None if delta is None else delta.cpu(), 0.3)
    assert torch.equal(bits(whole[5:38]), bits(expected[0]))
    assert torch.equal(scale[5:38].cpu(), expected[1])
    merged = base.float() if delta is None else base.float() + 0.3 * delta
    assert torch.equal(scale[5:38], fp8.row_scale(merged))
    assert torch.equal(bits(whole[5:38]), bits(fp8.quantize_rows(merged)[0]))
    assert whole[38:].float().eq(0).all()
    assert whole[:5].float().eq(0).all()


def test_merge_rounds_every_e4m3_tie_to_even(weights: ModuleType) -> None:
    """Every number halfway between two E4M3 numbers, both signs, beside 448 that makes the scale 1."""
    numbers = torch.arange(127, dtype=torch.uint8).view(fp8.FP8).double()
    ties = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat((ties, -ties, torch.tensor([448.0]))).float()[None].to(DEVICE)
    q, scale = torch.empty_like(row, dtype=fp8.FP8), torch.empty(1, 1, device=DEVICE)
    weights.merge_quantize_rows(row, None, 1.0, q, scale)
    assert scale.item() == 1.0
    assert torch.equal(bits(q), bits(row.cpu().to(fp8.FP8)))


def test_integers_on_the_gpu_have_the_bits_of_the_cpu() -> None:
    value = normal(65, 3072, dtype=torch.bfloat16)
    for seen, expected in zip(storage.quantize(value), storage.quantize(value.cpu()), strict=True):
        assert torch.equal(seen.cpu(), expected)


class TestOnTheGpu:
    """What only a GPU runs: the matrix product, the public functions' choice of kernels, compiled code."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows_scaled", [True, False])
    @pytest.mark.parametrize("with_bias", [True, False])
    @pytest.mark.parametrize("tokens", [1, 33])
    def test_scaled_linear(self, dtype: torch.dtype, rows_scaled: bool, with_bias: bool, tokens: int) -> None:
        x = normal(2, tokens, 256)
        q, q_scale = fp8.quantize(x, None if rows_scaled else fp8.tensor_scale(x))
        weight, weight_scale = fp8.merge_quantize(normal(512, 256, seed=1), None, 1.0, per_row=rows_scaled)
        bias = normal(512, dtype=dtype, seed=2) if with_bias else None
        seen = fp8.scaled_linear(q, q_scale, weight, weight_scale, bias, dtype)
        there = (q, q_scale, weight, weight_scale, torch.zeros(512) if bias is None else bias)
        expected = fp8.scaled_linear(*(t.cpu() for t in there), torch.float32)
        assert (seen.dtype, seen.shape) == (dtype, (2, tokens, 512))
        # Hopper's fast accumulation keeps about 14 bits of the sum.
        assert relative_l2(seen.cpu(), expected) < torch.finfo(dtype).eps + 1e-3

    @pytest.mark.parametrize("rows_scaled", [True, False])
    @pytest.mark.parametrize("tokens", [33, 40])
    def test_pictures_that_lie_apart_are_not_copied(self, rows_scaled: bool, tokens: int) -> None:
        """Of 33 tokens, the second picture's scales lie where cuBLASLt takes none."""
        x = normal(3, tokens + 8, 256)
        q, q_scale = fp8.quantize(x, None if rows_scaled else fp8.tensor_scale(x))
        part, part_scale = q[:, 8:], q_scale[:, 8:].contiguous() if rows_scaled else q_scale
        weight, bias = fp8.merge_quantize(normal(512, 256, seed=1), None, 1.0), normal(512, dtype=torch.bfloat16)

        def product(q: Tensor, q_scale: Tensor) -> Tensor:
            return fp8.scaled_linear(q, q_scale, *weight, bias, torch.bfloat16)

        seen = torch.compile(product, fullgraph=True, dynamic=True)(part, part_scale)
        assert torch.equal(seen, product(part, part_scale))
        assert relative_l2(seen, product(part.contiguous(), part_scale)) < 1e-3
        if rows_scaled and tokens == 40:  # else scales are copied
            assert "copy" not in kernel_names(lambda: product(part, part_scale)).lower()

    @pytest.mark.parametrize("with_bias", [True, False])
    @pytest.mark.parametrize(
        ("rows", "columns", "width"), [(4608, 3072, 3072), (9216, 512, 256), (20000, 48, 160), (77, 512, 256)]
    )
    def test_product_without_a_workspace_has_pytorchs_bits(
        self, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, width: int, with_bias: bool
    ) -> None:
        reason = cublaslt.why_not(0)
        if torch.cuda.get_device_capability() == (9, 0):
            assert reason is None
        elif reason:
            pytest.skip(reason)
        (q, q_scale), weight = fp8.quantize_rows(normal(rows, width)), fp8.quantize_rows(normal(columns, width, seed=1))
        bias = normal(columns, dtype=torch.bfloat16, seed=2) if with_bias else None

        def product() -> Tensor:
            return fp8.scaled_linear(q, q_scale, *weight, bias, torch.bfloat16)

        seen = product()
        assert "memset" not in kernel_names(product).lower()
        monkeypatch.setattr(cublaslt, "why_not", lambda index: "as if it were another GPU")
        assert torch.equal(seen, product())

    def test_products_of_several_threads_do_not_mix(self) -> None:
        """A description of a product holds the addresses of the call that is being made."""
        weight = fp8.quantize_rows(normal(512, 256, seed=1))
        inputs = [fp8.quantize_rows(normal(64, 256, seed=seed) * 10.0**seed) for seed in range(4)]
        expected = [fp8.scaled_linear(*x, *weight, None, torch.bfloat16) for x in inputs]

        def many(index: int) -> bool:
            outs = [fp8.scaled_linear(*inputs[index], *weight, None, torch.bfloat16) for _ in range(200)]
            return all(torch.equal(out, expected[index]) for out in outs)

        with ThreadPoolExecutor() as pool:
            assert all(pool.map(many, range(4)))

    @pytest.mark.parametrize("per_row", [True, False])
    def test_merge_on_the_gpu_equals_the_cpu(self, per_row: bool) -> None:
        base, delta = normal(65, 3072, dtype=torch.bfloat16), normal(65, 3072, seed=1)
        seen = fp8.merge_quantize(base, delta, -0.7, per_row=per_row)
        expected = fp8.merge_quantize(base.cpu(), delta.cpu(), -0.7, per_row=per_row)
        assert torch.equal(bits(seen[0]), bits(expected[0]))
        assert torch.equal(seen[1].cpu(), expected[1])

    @pytest.mark.parametrize("static", [False, True])
    def test_compiled_chain_is_one_graph_with_the_kernels(self, static: bool) -> None:
        """Norm, product, GELU and join, product: the kernels run, and another number of tokens compiles nothing."""
        fused.load_kernels()
        mod, scale = normal(2, 2, 128, dtype=torch.bfloat16, seed=1) * 0.3, given(0.02 if static else None)
        first, second = (fp8.merge_quantize(normal(n, k) * k**-0.5, None, 1.0) for n, k in ((512, 128), (128, 384)))

        def product(quantized: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
            return fp8.scaled_linear(*quantized, *weight, None, torch.bfloat16)

        def chain(x: Tensor) -> Tensor:
            wide = product(fp8.quantize_norm(x, mod[0], mod[1], scale), first)
            plain = product(fp8.quantize(wide[..., :128], scale), first)
            joined = product(fp8.quantize_join_gelu(plain[..., :128], wide[..., 256:], scale), second)
            return joined + product(fp8.quantize_gelu(plain[..., 128:], scale), second)

        def exact(x: Tensor) -> Tensor:
            """The same FP8 weights with inputs that are not quantized."""
            first_32, second_32 = (fp8.dequantize(*weight, torch.float32) for weight in (first, second))
            wide = F.linear(fused.modulated_norm(x.float(), *mod.float()), first_32)
            plain = F.linear(wide[..., :128], first_32)
            joined = F.linear(fused.join_gelu(plain[..., :128], wide[..., 256:]), second_32)
            return joined + F.linear(F.gelu(plain[..., 128:], approximate="tanh"), second_32)

        compiled = torch.compile(chain, fullgraph=True)
        for tokens in (33, 70, 512):
            x = normal(2, tokens, 128, dtype=torch.bfloat16, seed=tokens)
            torch._dynamo.mark_dynamic(x, 1)
            with torch.compiler.set_stance("default" if tokens == 33 else "fail_on_recompile"):
                seen = compiled(x)
            assert relative_l2(seen, exact(x)) < 1.15 * relative_l2(chain(x), exact(x)) < 0.1
        names = kernel_names(lambda: compiled(x))
        for name in ("_modulated_norm_kernel", "_join_gelu_kernel", "_quantize_kernel"):
            assert name in names
        assert "_modulated_norm_kernel" not in kernel_names(lambda: chain(x))

    def test_eager_merges_use_the_kernel(self) -> None:
        base = normal(64, 256, dtype=torch.bfloat16)
        fp8.merge_quantize(base, None, 1.0)
        assert "_merge_kernel" in kernel_names(lambda: fp8.merge_quantize(base, None, 1.0))


def kernel_names(function: Callable[[], object]) -> str:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages())
