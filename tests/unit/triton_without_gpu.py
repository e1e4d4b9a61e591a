"""Run as a script: compiles every Triton kernel for a GPU that is not there, or runs some in Triton's interpreter.

`python -m tests.unit.triton_without_gpu compile 90` calls the public functions with tensors of FLUX's sizes on the CPU;
a launch compiles for that compute capability and goes no further. Prints a line of JSON: kernel -> its shared memory.
`TRITON_INTERPRET=1 python -m tests.unit.triton_without_gpu interpret` compares results with plain PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
HIDDEN, MLP, HEADS, DIM = 3072, 12288, 24, 128
LARGEST_SHARED: dict[str, int] = {}


class NoGpu:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def compile_all(capability: int) -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compiled(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel = launch(self, *arguments, **{**options, "warmup": True})
        name = self.fn.__name__
        LARGEST_SHARED[name] = max(LARGEST_SHARED.get(name, 0), kernel.metadata.shared)
        return kernel

    JITFunction.run = compiled
    driver.set_active(NoGpu(capability))
    for call in (*plain_calls(), *(fp8_calls() if capability >= 89 else ())):
        call()


def plain_calls() -> list[Callable[[], Any]]:
    from trt_core import triton_merge
    from trt_core.flux import triton_kernels, triton_rows
    from trt_core.flux.open_sum import OpenSum
    from trt_core.merge_table import Merge

    x, wide, mod = empty(1, 64, HIDDEN), empty(1, 64, 3 * HIDDEN + MLP), empty(1, HIDDEN)
    q = wide[..., :HIDDEN].unflatten(-1, (HEADS, DIM))
    cos, norm = empty(64, DIM // 2, dtype=FP32), empty(DIM)
    base = empty(HIDDEN, HIDDEN)
    calls: list[Callable[[], Any]] = [
        lambda: triton_rows.modulated_norm(x, mod, mod, 1e-6),
        lambda: triton_rows.gated_norm(OpenSum(x, x, mod), mod, mod, 1e-6),
        lambda: triton_rows.join_gelu(x, wide[..., 3 * HIDDEN :]),
        lambda: triton_kernels.norm_rope(q, q, norm, norm, cos, cos, cos, cos, 0, 1e-6),
        lambda: triton_kernels.norm_rope_qk(q, q, (norm, norm), (norm, norm), cos, cos, cos, cos, 64, 1e-6),
    ]
    for batch in (1, 2, 8):
        for dtype, scales in ((BF16, 0), (torch.int8, 2), (torch.int8, 1)):
            calls.append(lambda batch=batch, dtype=dtype, scales=scales: modulations(batch, dtype, scales))
    for terms in merged_terms():
        calls.append(lambda terms=terms: triton_merge.merge_all([Merge(0, HIDDEN, base, base, tuple(terms))]))
    return calls


def fp8_calls() -> list[Callable[[], Any]]:
    from trt_core import triton_merge
    from trt_core.flux import triton_attention, triton_rows, triton_weights
    from trt_core.flux.fp8_attention import QkvStream, ValueSource
    from trt_core.flux.open_sum import OpenSum
    from trt_core.merge_table import Fp8Place, Merge

    x, mlp, mod, one = empty(1, 64, HIDDEN), empty(1, 64, MLP), empty(1, HIDDEN), empty(1, dtype=FP32)
    norm, cos, base = empty(DIM), empty(64, DIM // 2, dtype=FP32), empty(HIDDEN, HIDDEN)
    out = (empty(HIDDEN, HIDDEN, dtype=FP8), empty(HIDDEN, 1, dtype=FP32))
    place = Fp8Place(*out)
    with_mean = place._replace(mean=empty(HIDDEN, dtype=FP32), correction=empty(HIDDEN, dtype=FP32))
    sources = [ValueSource(mod, mod, *weight, empty(HIDDEN)) for weight in (out, (out[0], one), (base, None))]
    streams = [QkvStream(empty(1, 64, 3 * HIDDEN), norm, norm, cos, cos, source) for source in sources]
    calls: list[Callable[[], Any]] = []
    for scale in (None, one):
        calls += [
            lambda scale=scale: triton_rows.modulated_norm_fp8(x, mod, mod, 1e-6, scale),
            lambda scale=scale: triton_rows.gated_norm_fp8(OpenSum(x, x, mod), mod, mod, 1e-6, scale),
            lambda scale=scale: triton_rows.join_gelu_fp8(x, mlp, scale),
            lambda scale=scale: triton_rows.join_gelu_fp8(x.to(FP8), mlp, scale, one),
            lambda scale=scale: triton_rows.gelu_fp8(mlp, scale),
            lambda scale=scale: triton_rows.quantize_fp8(x, scale),
        ]
    calls.append(lambda: modulations(1, FP8, 1))
    for delta in (None, base.float()):
        calls.append(lambda delta=delta: triton_weights.merge_quantize_rows(base, delta, 1.0, *out))
    for terms in merged_terms():
        calls.append(lambda terms=terms: triton_merge.merge_all([Merge(0, HIDDEN, base, place, tuple(terms))]))
    for terms in ([], merged_terms()[0]):
        calls.append(lambda terms=terms: triton_merge.merge_all([Merge(5, 99, base, with_mean, tuple(terms))]))
    return [
        *calls,
        *(lambda stream=stream: triton_attention.quantized_qkv(stream, stream, HEADS, 1e-6) for stream in streams),
        *(lambda stream=stream: triton_attention.quantized_qkv(stream, None, HEADS, 1e-6) for stream in streams),
    ]


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def merged_terms() -> list[list[Any]]:
    """LoRAs on one weight for which kernels differ: by dtype, rank and number."""
    from trt_core.low_rank import Term

    kinds = ((BF16, 16, 1), (BF16, 32, 1), (FP32, 16, 1), (BF16, 128, 1), (BF16, 16, 2))
    return [
        [Term(empty(HIDDEN, rank, dtype=dtype), empty(rank, HIDDEN, dtype=dtype), 1.0)] * count
        for dtype, rank, count in kinds
    ]


def modulations(batch: int, dtype: torch.dtype, scales: int) -> None:
    from trt_core.flux import triton_modulation as kernels

    vec, keys, table = empty(kernels.ROWS, HIDDEN), empty(64, HIDDEN), empty(64, 9 * HIDDEN)
    times = kernels.following(empty(batch), empty(1024, dtype=FP32))
    found = kernels.find(vec, batch, times, keys, empty(1, dtype=torch.int32))
    kernels.find(vec, batch, None, keys, empty(1, dtype=torch.int32))
    fields, blocks = empty(3, kernels.FIELDS, dtype=torch.int64), empty(9, 3, dtype=torch.int32)
    for projected in (None, empty(kernels.ROWS, 48, dtype=FP32)):
        layers = kernels.Layers(fields, blocks, dtype, scales, projected is not None)
        kernels.modulate(vec, projected, layers, found, table, empty(9, batch, HIDDEN))
    kernels.remember(vec, found, keys)


def interpret() -> None:
    """Raises `AssertionError` where a kernel's arithmetic is not that of plain PyTorch."""
    from trt_core.flux import fused, triton_kernels, triton_rows
    from trt_core.flux.open_sum import OpenSum
    from trt_core.flux.rope import rotate

    interpret_table()
    interpret_merges()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, scale, angle = normal(2, 5, 3, 16), normal(16), normal(5, 8)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale
    pe = (angle.cos(), angle.sin())
    same(triton_kernels.norm_rope(x, x, scale, scale, *pe, *pe, 0, 1e-6), rotate(normed, *pe))
    img, txt, norms = normal(2, 5, 144), normal(2, 3, 150)[..., :144], [(normal(16), normal(16)) for _ in range(2)]
    text_pe = (normal(3, 8), normal(3, 8))
    q, other = img[..., :48].unflatten(-1, (3, 16)), txt[..., :48].unflatten(-1, (3, 16))
    same(
        triton_kernels.norm_rope_qk(q, other, *norms, *pe, *text_pe, 3, 1e-6),
        torch.stack(fused.norm_rope_qk(img, txt, *norms, pe, text_pe)),
    )
    stream, mod = OpenSum(normal(2, 9, 48)[:, 2:], normal(2, 7, 50)[..., :48], normal(2, 48)), normal(6, 2, 48)
    pairs = zip(triton_rows.gated_norm(stream, *mod[:2], 1e-6), fused.gated_norm(stream, *mod[:2]), strict=True)
    for seen, expected in pairs:
        same(seen, expected)


def interpret_table() -> None:
    """Without LoRAs: with NumPy 2.4, Triton 3.6 interprets no loop whose bound is an argument."""
    from tests.unit import table_model

    for hidden, kind in ((128, "int8"), (256, "plain"), (48, "int8"), (48, "plain")):
        for batch in (1, 3):
            table_model.check(torch.device("cpu"), torch.float16, hidden, kind, batch, ranks=())


def interpret_merges() -> None:
    """Of different sizes, with and without edges, in one launch: each gets its own numbers, in its own rows alone."""
    from trt_core.low_rank import Term
    from trt_core.merge_table import Merge
    from trt_core.triton_merge import merge_all

    generator = torch.Generator().manual_seed(1)
    merges, expected = [], []
    for count, (rows, width) in enumerate(((64, 256), (70, 30), (128, 256), (5, 144)) * 2):
        base, out = torch.randn(rows + 3, width, generator=generator), torch.full((rows + 3, width), 7.0)
        terms = tuple(
            Term(torch.randn(rows, 7, generator=generator), torch.randn(7, width, generator=generator), 0.3 - term)
            for term in range(1 + count % 2)
        )
        merges.append(Merge(2, 2 + rows, base, out, terms))
        whole = torch.full_like(out, 7.0)
        whole[2 : 2 + rows] = base[2 : 2 + rows] + sum(factor * (up @ down) for up, down, factor in terms)
        expected.append(whole)
    merge_all(merges)
    for merge, whole in zip(merges, expected, strict=True):
        same(merge.out, whole)


def same(seen: Tensor, expected: Tensor) -> None:
    assert seen.shape == expected.shape
    assert torch.allclose(seen, expected, rtol=1e-4, atol=1e-4), float((seen - expected).abs().max())


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_all(int(sys.argv[2]))
        sys.stdout.write(json.dumps(LARGEST_SHARED) + "\n")
    else:
        interpret()
