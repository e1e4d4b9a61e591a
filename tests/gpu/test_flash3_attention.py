"""FlashAttention-3 on a Hopper GPU: exact, inside compiled blocks and CUDA graphs, and the plan's choice to make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trt_core
from trt_core.backends.base import Request
from trt_core.backends.check import error_ratio, relative_l2
from trt_core.backends.inductor import InductorSegment
from trt_core.config import Attention, Profile
from trt_core.errors import UnsupportedGPU
from trt_core.flux import flash3_attention
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.attention import attend, attention_function, runnable_kernels
from trt_core.flux.catalogue import SegmentName, segment
from trt_core.host import Silent
from trt_core.step_graph import USED

from .conftest import inputs_of, output_of, real_shaped_model

DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
WHY_NOT = flash3_attention.why_not(BF16, DEVICE, 128) if torch.cuda.is_available() else "no NVIDIA GPU"
needs_flash3 = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(BF16)


@needs_flash3
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 65, 257, 4608])
def test_it_computes_attention(batch: int, tokens: int) -> None:
    q, k, wide = (
        normal(batch, tokens, 4, 128),
        normal(batch, tokens, 4, 128, seed=1),
        normal(batch, tokens, 2048, seed=2),
    )
    v = wide[..., 1024:1536].unflatten(-1, (4, 128))
    exact = attend(q.float(), k.float(), v.float())
    seen = attention_function(Attention.FLASH3)(q, k, v)
    assert (seen.shape, seen.dtype) == (exact.shape, BF16)
    assert relative_l2(seen, exact) < 1.2 * max(relative_l2(attend(q, k, v), exact), 2**-9)
    assert torch.equal(seen, attention_function(Attention.FLASH3)(q, k, v))


@needs_flash3
@pytest.mark.parametrize("name", [SegmentName.DOUBLE_BLOCK, SegmentName.SINGLE_BLOCK])
def test_compiled_blocks(name: SegmentName) -> None:
    arch = FluxArchitecture(
        in_channels=64, out_channels=64, hidden=512, heads=4, mlp_hidden=2048, double_depth=1, single_depth=1,
        context_dim=64, vec_dim=32, guidance=True, axes_dim=(16, 56, 56),
    )  # fmt: skip
    described, reference = (
        segment(name, arch, attention_function(Attention.FLASH3)),
        segment(name, arch, attend).function,
    )
    for batch in (1, 2):
        asked = Request(described, BF16, DEVICE, Profile.around(batch, 512, 64), reference)
        compiled = InductorSegment(asked)
        assert error_ratio(compiled, asked) < 1.5
        inputs = described.random_inputs(batch, 300, 20, BF16, DEVICE)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seen = compiled(*inputs)
            torch.cuda.synchronize()
        assert "FlashAttnFwdSm90" in " ".join(event.key for event in profile.key_averages())
        for s, e in zip(seen, reference(*inputs), strict=True):
            assert relative_l2(s, e) < 0.02


@needs_flash3
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_and_its_graph(backend: str, cache_folder: str) -> None:
    model: Any = real_shaped_model()
    arguments, expected = inputs_of(model), output_of(model, inputs_of(model))
    trt_core.compile_transformer(
        model, backend=backend, attention="flash3", cache_folder=cache_folder, progress=Silent()
    )
    first = output_of(model, arguments)
    assert relative_l2(first, expected) < 0.02
    assert "flash3 attention" in str(model.trt_report().segments)
    for _ in range(3):
        assert torch.equal(output_of(model, arguments), first)
    assert model.trt_report().step == USED


@needs_flash3
def test_the_plan_tries_it() -> None:
    assert Attention.FLASH3 in runnable_kernels(BF16, DEVICE, 24, 128)
    assert Attention.FLASH3 not in runnable_kernels(torch.float16, DEVICE, 24, 128)


def test_where_it_is_missing_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, cache_folder: str) -> None:
    monkeypatch.setattr(flash3_attention, "installed", lambda: False)
    model: Any = real_shaped_model()
    trt_core.compile_transformer(
        model, backend="eager", attention="flash3", cache_folder=cache_folder, progress=Silent()
    )
    with pytest.raises(UnsupportedGPU, match='attention="flash3" cannot be used'):
        output_of(model, inputs_of(model))
