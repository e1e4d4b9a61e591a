"""A step as a CUDA graph: the bits of the step without one, through LoRAs, sizes, failures, and its memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_core
import trt_core.step
import trt_core.step_graph
from trt_core.gpu import current_gpu, why_not_fp8
from trt_core.host import Silent
from trt_core.step_graph import EAGER_CALLS, USED

from .conftest import add_loras, inputs_of, output_of, real_shaped_model

ATTENTION_AND_MLP = ["to_q", "to_k", "add_v_proj", "proj_mlp", "norm.linear", "norm1.linear"]
BACKENDS = pytest.mark.parametrize("backend", ["eager", "inductor"])
PRECISIONS = pytest.mark.parametrize("precision", ["bf16", "fp8"])
SIZES: list[dict[str, int]] = [{}, {"height": 24, "width": 30}, {"batch": 2}]


def compiled(cache: str, precision: str = "bf16", backend: str = "eager", **options: Any) -> Any:
    model = real_shaped_model()
    if precision == "fp8":
        if reason := why_not_fp8(current_gpu()):
            pytest.skip(reason)
        trt_core.quantize_fp8_(model, progress=Silent())
    return trt_core.compile_transformer(model, backend=backend, cache_folder=cache, progress=Silent(), **options)


def plain(model: Any, arguments: dict[str, Any]) -> Tensor:
    """The output without a graph, of the same compiled blocks and the same bound weights."""
    module = model._trt_state.module
    before, module.config = module.config, replace(module.config, cuda_graph=False)
    try:
        return output_of(model, arguments)
    finally:
        module.config = before


def from_graph(model: Any, arguments: dict[str, Any]) -> Tensor:
    output = output_of(model, arguments)
    assert model.trt_report().step == USED
    return output


def capture(model: Any, arguments: dict[str, Any]) -> None:
    for _ in range(EAGER_CALLS):
        output_of(model, arguments)
        assert model.trt_report().step != USED
    from_graph(model, arguments)


# -- the same bits -----------------------------------------------------------------------------------------------------


@BACKENDS
@PRECISIONS
def test_sizes_that_alternate_have_the_bits_of_the_plain_step(precision: str, backend: str, cache_folder: str) -> None:
    model = compiled(cache_folder, precision, backend)
    calls = [inputs_of(model, **sizes) for sizes in SIZES]
    expected = [plain(model, arguments) for arguments in calls]
    for arguments in calls:
        capture(model, arguments)
    for _ in range(3):
        for arguments, output in zip(calls, expected, strict=True):
            assert torch.equal(from_graph(model, arguments), output)
    assert model.trt_report().builds == 1


@BACKENDS
@PRECISIONS
def test_one_graph_serves_every_lora(
    precision: str, backend: str, cache_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In FP8, every one that leaves modulations alone."""
    model = compiled(cache_folder, precision, backend)
    add_loras(model, ATTENTION_AND_MLP if precision == "bf16" else ATTENTION_AND_MLP[:4])
    model.set_adapters("a")
    arguments = inputs_of(model)
    caplog.set_level(logging.INFO, logger="trt_core.module")
    capture(model, arguments)
    seen: dict[str, Tensor] = {}
    for names, strengths in ((["a"], [1.0]), (["b"], [1.0]), (["a", "b"], [0.5, -1.0]), (["a"], [0.25])):
        model.set_adapters(names, strengths)
        seen[f"{names} {strengths}"] = from_graph(model, arguments)
        assert torch.equal(seen[f"{names} {strengths}"], plain(model, arguments))
    model.disable_adapters()
    seen["none"] = from_graph(model, arguments)
    assert torch.equal(seen["none"], plain(model, arguments))
    outputs = list(seen.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert len([r for r in caplog.records if "captured as a CUDA graph" in r.getMessage()]) == 1


def test_loras_on_fp8_modulations_of_the_same_ranks_keep_the_graph(cache_folder: str) -> None:
    """They lie beside the stored matrix; other ranks lie elsewhere, and the graph begins again."""
    model = compiled(cache_folder, "fp8")
    add_loras(model, ["to_q", "norm.linear", "norm1.linear"])
    arguments, seen = inputs_of(model), []
    model.set_adapters("a")
    capture(model, arguments)
    for name, strength in (("a", 1.0), ("b", 1.0), ("a", 0.25)):
        model.set_adapters(name, strength)
        seen.append(from_graph(model, arguments))
        assert torch.equal(seen[-1], plain(model, arguments))
    for names in (["a", "b"], []):
        model.set_adapters(names) if names else model.disable_adapters()
        capture(model, arguments)
        seen.append(from_graph(model, arguments))
        assert torch.equal(seen[-1], plain(model, arguments))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@PRECISIONS
def test_every_input_is_copied(precision: str, cache_folder: str) -> None:
    model = compiled(cache_folder, precision)
    arguments = inputs_of(model, batch=2)
    capture(model, arguments)
    first = from_graph(model, arguments)
    for name, tensor in arguments.items():
        # Not the same for all tokens: attention sees differences of positions.
        changed = {**arguments, name: tensor * 3 + 1 if "ids" in name else tensor * 0.5}
        if name == "txt_ids":
            changed[name] = torch.arange(tensor.numel(), device="cuda").view_as(tensor).to(tensor.dtype)
        output = from_graph(model, changed)
        assert not torch.equal(output, first), name
        assert torch.equal(output, plain(model, changed)), name
    assert torch.equal(from_graph(model, arguments), first)


def test_the_output_belongs_to_the_caller(cache_folder: str) -> None:
    model = compiled(cache_folder)
    one, other = inputs_of(model), inputs_of(model, seed=5)
    capture(model, one)
    first = from_graph(model, one)
    kept = first.clone()
    second = from_graph(model, other)
    assert not torch.equal(second, kept)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(from_graph(model, one), kept)


def test_streams_and_inference_mode(cache_folder: str) -> None:
    model = compiled(cache_folder)
    calls = [inputs_of(model, seed=seed) for seed in range(4)]
    expected = [plain(model, arguments) for arguments in calls]
    capture(model, calls[0])
    with torch.inference_mode():
        capture(model, calls[0])
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(3):
        outputs = []
        for stream, arguments in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(from_graph(model, arguments))
        torch.cuda.synchronize()
        assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(from_graph(model, calls[1]), expected[1])
    assert torch.equal(from_graph(model, calls[1]), expected[1])


# -- steps that are no graph -------------------------------------------------------------------------------------------


def test_a_controlnet_runs_without_the_graph(cache_folder: str) -> None:
    model = compiled(cache_folder)
    arguments = inputs_of(model)
    capture(model, arguments)
    first = from_graph(model, arguments)
    tokens = arguments["hidden_states"].shape[1]
    residual = torch.randn(1, tokens, 256, device="cuda", dtype=torch.bfloat16)
    controlled = {**arguments, "controlnet_block_samples": [residual]}
    output = output_of(model, controlled)
    assert "residuals" in model.trt_report().step
    assert not torch.equal(output, first)
    assert torch.equal(output, plain(model, controlled))
    assert torch.equal(from_graph(model, arguments), first)


def test_tensorrt_runs_without_a_graph(needs_tensorrt: None, cache_folder: str) -> None:
    model = compiled(cache_folder, backend="tensorrt")
    for _ in range(EAGER_CALLS + 1):
        output_of(model, inputs_of(model))
    assert "TensorRT" in model.trt_report().step


def test_a_capture_around_the_call_is_left_alone(cache_folder: str) -> None:
    model = compiled(cache_folder)
    arguments = inputs_of(model)
    capture(model, arguments)
    expected = from_graph(model, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = output_of(model, arguments)
    assert "another capture" in model.trt_report().step
    graph.replay()
    assert torch.equal(output, expected)


# -- memory ------------------------------------------------------------------------------------------------------------


def reserved_bytes() -> int:
    """What PyTorch holds of the GPU's memory once all that can be given back is."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_memory_comes_back(cache_folder: str) -> None:
    model = compiled(cache_folder)
    large, small = inputs_of(model, height=64, width=64, batch=2), inputs_of(model, height=32, width=32)
    for arguments in (large, small):
        plain(model, arguments)
    before = reserved_bytes()
    capture(model, large)
    with_one = reserved_bytes()
    assert with_one >= before + 8 * 2**20, "the activations of 8192 tokens"
    capture(model, small)
    assert reserved_bytes() - with_one < (with_one - before) / 2, "the smaller one lies over the larger one"
    trt_core.restore_transformer(model)
    assert reserved_bytes() <= before


def test_another_model_keeps_its_graphs(cache_folder: str) -> None:
    """The pool of one goes while the other's is in use."""
    one, other = compiled(cache_folder), compiled(cache_folder)
    arguments = inputs_of(one)
    for model in (one, other):
        capture(model, arguments)
    expected = from_graph(other, arguments)
    trt_core.restore_transformer(one)
    torch.cuda.empty_cache()
    filler = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
    assert torch.equal(from_graph(other, arguments), expected)
    assert all(bool(tensor.isnan().all()) for tensor in filler)


# -- failures ----------------------------------------------------------------------------------------------------------


def without_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("provoked")


def waiting(*_: Any) -> None:
    """Forbidden in a capture: CUDA makes it invalid."""
    torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("failure", [without_memory, waiting])
def test_a_capture_that_fails_leaves_everything_else_usable(
    failure: Callable[..., None], cache_folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Last in this file: there is no capture in this process afterwards."""
    model = compiled(cache_folder)
    arguments, other = inputs_of(model), inputs_of(model, height=24, width=30)
    expected, other_expected = plain(model, arguments), plain(model, other)
    stream, real = torch.cuda.current_stream(), trt_core.step.rope_cos_sin

    def failing(*given: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            failure()
        return real(*given)

    monkeypatch.setattr(trt_core.step_graph, "_FAILED", [])  # the test before
    monkeypatch.setattr(trt_core.step, "rope_cos_sin", failing)
    for _ in range(EAGER_CALLS + 3):
        assert torch.equal(output_of(model, arguments), expected)
        assert torch.equal(output_of(model, other), other_expected)
    assert "a capture failed" in model.trt_report().step
    assert len([r for r in caplog.records if "without CUDA graphs" in r.getMessage()]) == 1
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.randn(1000, device="cuda").std() > 0.5, "random numbers still come"
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - 2**28, "the allocator still gives memory back"
