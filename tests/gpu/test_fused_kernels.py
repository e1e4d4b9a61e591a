"""The Triton kernels that round to the model's dtype against plain PyTorch in fp32."""

from __future__ import annotations

import pytest
import torch

from trt_core.backends.check import relative_l2
from trt_core.flux import fused
from trt_core.flux.open_sum import OpenSum

pytest.importorskip("triton")
DEVICE = "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def wide_heads(tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Heads as a view of a wider product, as linear1's output holds them: strided over tokens."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    product = torch.randn(2, tokens, 3 * heads * dim + 16, generator=generator, device=DEVICE).to(dtype)
    return product[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "dim"), [(24, 128), (2, 128), (3, 32)])
@pytest.mark.parametrize(("txt_tokens", "img_tokens"), [(7, 33), (512, 100), (1, 1)])
def test_joint_norm_rope(dtype: torch.dtype, heads: int, dim: int, txt_tokens: int, img_tokens: int) -> None:
    from trt_core.flux import triton_kernels

    txt, img = wide_heads(txt_tokens, heads, dim, dtype, 1), wide_heads(img_tokens, heads, dim, dtype, 2)
    txt_scale, img_scale = (torch.randn(dim, device=DEVICE).to(dtype) for _ in range(2))
    pe = [torch.randn(n, dim // 2, device=DEVICE) for n in (txt_tokens, txt_tokens, img_tokens, img_tokens)]
    seen = triton_kernels.norm_rope(img, txt, img_scale, txt_scale, pe[2], pe[3], pe[0], pe[1], txt_tokens, fused.EPS)
    expected = fused.joint_norm_rope(txt.float(), img.float(), txt_scale.float(), img_scale.float(), *pe)
    assert seen.is_contiguous()
    assert relative_l2(seen, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [48, 256, 3072, 15360])
def test_modulated_norm(dtype: torch.dtype, width: int) -> None:
    """Batch 2, x a slice of longer rows of tokens, shift and scale views of one modulation."""
    from trt_core.flux import triton_rows

    x = torch.randn(2, 40, width, device=DEVICE).to(dtype)[:, 7:] * 3 + 1
    mod = torch.randn(6, 2, width, device=DEVICE).to(dtype)
    seen = triton_rows.modulated_norm(x, mod[3], mod[4], fused.EPS)
    assert (seen.dtype, seen.is_contiguous()) == (dtype, True)
    assert relative_l2(seen, fused.modulated_norm(x.float(), mod[3].float(), mod[4].float())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_txt", [0, 5])
@pytest.mark.parametrize("heads", [3, 24])
def test_norm_rope_qk(dtype: torch.dtype, n_txt: int, heads: int) -> None:
    """q and k in one launch have the bits of two launches."""
    from trt_core.flux import triton_kernels

    width = heads * 128
    img, txt = (torch.randn(2, n, 3 * width + 16, device=DEVICE).to(dtype) for n in (33, max(n_txt, 1)))
    norms = [tuple(torch.randn(2, 128, device=DEVICE).to(dtype)) for _ in range(2)]
    pe = [torch.randn(n, 64, device=DEVICE) for n in (33, 33, max(n_txt, 1), max(n_txt, 1))]
    first = [x[..., :width].unflatten(-1, (heads, 128)) for x in (img, txt)]
    keys = [x[..., width : 2 * width].unflatten(-1, (heads, 128)) for x in (img, txt)]
    seen = triton_kernels.norm_rope_qk(*first, *norms, *pe, n_txt, fused.EPS)
    assert torch.equal(seen[0], triton_kernels.norm_rope(*first, norms[0][0], norms[1][0], *pe, n_txt, fused.EPS))
    assert torch.equal(seen[1], triton_kernels.norm_rope(*keys, norms[0][1], norms[1][1], *pe, n_txt, fused.EPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_joint_product(dtype: torch.dtype) -> None:
    """The bits of two products, in two kernels."""
    img, txt = (torch.randn(1, n, 256, device=DEVICE).to(dtype) for n in (64, 24))
    layers = [((torch.randn(384, 256, device=DEVICE) / 16).to(dtype), torch.randn(384, device=DEVICE).to(dtype))
              for _ in range(2)]  # fmt: skip
    compiled = torch.compile(fused.joint_product, fullgraph=True)
    seen = compiled(img, txt, *layers)
    expected = torch.cat((torch.nn.functional.linear(txt, *layers[1]), torch.nn.functional.linear(img, *layers[0])), 1)
    assert torch.equal(seen, expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(img, txt, *layers)
        torch.cuda.synchronize()
    assert sum(e.count for e in profile.key_averages() if e.self_device_time_total > 0) == 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [48, 256, 3072])
def test_gated_norm(dtype: torch.dtype, width: int) -> None:
    """The sum has the bits of PyTorch's, rounded once, and the norm is that of the rounded sum."""
    from trt_core.flux import triton_rows

    x = torch.randn(2, 40, width, device=DEVICE).to(dtype)[:, 7:] * 3 + 1
    add = torch.randn(2, 33, width + 16, device=DEVICE).to(dtype)[..., :width]
    mod = torch.randn(6, 2, width, device=DEVICE).to(dtype)
    stream = OpenSum(x, add, mod[2])
    total, seen = triton_rows.gated_norm(stream, mod[3], mod[4], fused.EPS)
    assert (total.dtype, seen.dtype, total.is_contiguous(), seen.is_contiguous()) == (dtype, dtype, True, True)
    assert relative_l2(total, x.float() + mod[2][:, None].float() * add.float()) < torch.finfo(dtype).eps
    assert torch.equal(seen, triton_rows.modulated_norm(total, mod[3], mod[4], fused.EPS))


def test_a_gated_sum_beyond_fp16_is_clamped() -> None:
    from trt_core.flux import triton_rows

    x = torch.full((1, 2, 64), 6e4, device=DEVICE, dtype=torch.float16)
    x[0, 1] = torch.nan
    gate = torch.tensor([[1.0, -3.0]], device=DEVICE, dtype=torch.float16).repeat(1, 32)
    total, _ = triton_rows.gated_norm(OpenSum(x, x, gate), gate, gate, fused.EPS)
    assert total[0, 0].tolist() == [65504.0, -65504.0] * 32
    assert total[0, 1].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("hidden", "mlp_hidden"), [(48, 160), (64, 256), (3072, 12288)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_join_gelu(dtype: torch.dtype, hidden: int, mlp_hidden: int, tokens: int) -> None:
    """attn a slice over tokens, mlp the end of linear1's rows; attn's part is copied bit for bit."""
    from trt_core.flux import triton_rows

    attn = torch.randn(2, tokens + 5, hidden, device=DEVICE).to(dtype)[:, 5:]
    mlp = (torch.randn(2, tokens, 3 * hidden + mlp_hidden, device=DEVICE) * 3).to(dtype)[..., 3 * hidden :]
    seen = triton_rows.join_gelu(attn, mlp)
    assert (seen.dtype, seen.is_contiguous()) == (dtype, True)
    assert torch.equal(seen[..., :hidden], attn)
    assert relative_l2(seen, fused.join_gelu(attn.float(), mlp.float())) < TOLERANCE[dtype]


def test_join_gelu_at_the_ends_of_the_range() -> None:
    """Large numbers pass or vanish, nothing turns into NaN but NaN."""
    from trt_core.flux import triton_rows

    mlp = torch.tensor([[[3e38, -3e38, 60.0, -60.0, -0.0, float("nan"), float("inf"), 1e-30]]], device=DEVICE)
    seen = triton_rows.join_gelu(mlp[..., :2], mlp)[0, 0, 2:].tolist()
    assert seen[:5] == [torch.tensor(3e38).item(), 0.0, 60.0, 0.0, 0.0]
    assert seen[5] != seen[5]
    assert seen[6:] == [float("inf"), pytest.approx(5e-31)]


def test_compiled_code_uses_the_kernel() -> None:
    """Inside `torch.compile` on a GPU the kernel runs, outside it does not."""
    fused.load_kernels()
    x = wide_heads(64, 2, 128, torch.bfloat16, 3)
    scale, cos, sin = torch.randn(128, device=DEVICE).bfloat16(), *torch.randn(2, 64, 64, device=DEVICE)
    names = []
    for function in (fused.norm_rope, torch.compile(fused.norm_rope, fullgraph=True)):
        function(x, scale, cos, sin)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function(x, scale, cos, sin)
            torch.cuda.synchronize()
        names.append(" ".join(event.key for event in profile.key_averages()))
    assert "norm_rope_kernel" not in names[0]
    assert "norm_rope_kernel" in names[1]


@pytest.mark.parametrize("name", ["_modulated_norm_kernel", "_gated_norm_kernel", "_join_gelu_kernel"])
def test_compiled_rows_use_the_kernels(name: str) -> None:
    """One compilation for every number of tokens, with strided inputs that Inductor computes itself."""
    fused.load_kernels()
    mod = torch.randn(2, 2, 256, device=DEVICE).bfloat16()

    def norm(x: torch.Tensor) -> torch.Tensor:
        return fused.modulated_norm(x * 2, mod[0].to(x), mod[1].to(x))

    def join(x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat((x, x, x), -1) * 2
        return fused.join_gelu(x + 1, wide[..., 256:])

    def gated(x: torch.Tensor) -> torch.Tensor:
        total, normed = fused.gated_norm(OpenSum(x * 2, x + 1, mod[0].to(x)), mod[0].to(x), mod[1].to(x))
        return total + normed

    function = {"_modulated_norm_kernel": norm, "_gated_norm_kernel": gated}.get(name, join)
    compiled = torch.compile(function, fullgraph=True)
    for tokens in (33, 64, 129):
        x = torch.randn(2, tokens, 256, device=DEVICE).bfloat16()
        torch._dynamo.mark_dynamic(x, 1)
        with torch.compiler.set_stance("default" if tokens == 33 else "fail_on_recompile"):
            assert relative_l2(compiled(x), function(x.float())) < 0.01
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(x)
        torch.cuda.synchronize()
    assert name in " ".join(event.key for event in profile.key_averages())
