"""A real-shaped FLUX through every backend: equal, exact under LoRAs, cached, and stoppable."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import trt_core
from tests.unit.tiny_flux import exact_inputs, tiny_transformer
from trt_core.backends.check import relative_l2
from trt_core.errors import BuildCancelled, BuildFailed
from trt_core.host import Silent

from .conftest import add_loras, inputs_of, output_of, real_shaped_model

TARGETS = ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "net.2", "proj_mlp", "proj_out", "norm.linear"]
pytestmark = pytest.mark.usefixtures("needs_tensorrt")


def compiled(model: Any, cache_folder: str, backend: str, **options: Any) -> Any:
    return trt_core.compile_transformer(model, backend=backend, cache_folder=cache_folder, progress=Silent(), **options)


def error_ratio(model: Any, output: torch.Tensor, arguments: dict[str, Any], reference: Any) -> float:
    """Error of `output` against fp32, in multiples of eager bf16's; `reference` is the eager bf16 model."""
    exact = copy.deepcopy(reference).float()
    fp32 = output_of(exact, exact_inputs(arguments))
    return relative_l2(output, fp32) / relative_l2(output_of(reference, arguments), fp32)


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
@pytest.mark.parametrize("backend", ["tensorrt", "inductor", "auto", "eager"])
def test_equal_to_eager(backend: str, adversarial: bool, cache_folder: str) -> None:
    model = tiny_transformer(heads=2, head_dim=128, double=1, single=2, adversarial=adversarial)
    model = model.to("cuda", torch.bfloat16)
    reference = copy.deepcopy(model)
    compiled(model, cache_folder, backend)
    for sizes in ({}, {"height": 24, "width": 30}, {"batch": 2}):
        arguments = inputs_of(model, **sizes)
        assert error_ratio(model, output_of(model, arguments), arguments, reference) < 1.5
    assert model.trt_report().builds == 1


def test_tensorrt_runs_all_four_halves(model: Any, cache_folder: str) -> None:
    compiled(model, cache_folder, "tensorrt")
    output_of(model, inputs_of(model))
    segments = model.trt_report().segments
    assert {name for name, words in segments.items() if words.startswith("tensorrt")} == {
        "double_qkv", "double_out", "single_qkv_mlp", "single_out",
    }  # fmt: skip
    assert 0 < model.trt_report().plan_bytes < 20e6


@pytest.mark.parametrize("backend", ["tensorrt", "inductor"])
def test_lora_switches_are_exact(backend: str, cache_folder: str) -> None:
    """A to B is a fresh B, A to none is the base, GPU and host base weights agree: all bit for bit."""
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    for base in ("gpu", "host"):
        model = real_shaped_model()
        compiled(model, cache_folder, backend, base_weights=base)
        arguments = inputs_of(model)
        seen = {"none": output_of(model, arguments)}
        add_loras(model, TARGETS)
        model.set_adapters("b")
        seen["b"] = output_of(model, arguments)
        for adapters, strengths in ((["a"], [1.0]), (["a", "b"], [0.5, -1.0]), (["a"], [1.0])):
            model.set_adapters(adapters, strengths)
            seen["a"] = output_of(model, arguments)
        assert not torch.equal(seen["a"], seen["b"])
        for _ in range(10):
            model.set_adapters("a")
            assert torch.equal(output_of(model, arguments), seen["a"])
            model.set_adapters("b")
            assert torch.equal(output_of(model, arguments), seen["b"])
        assert model.trt_report().last_refit.layers < 20
        model.disable_adapters()
        assert torch.equal(output_of(model, arguments), seen["none"])
        assert model.trt_report().builds == 1
        outputs[base] = seen
    assert all(torch.equal(outputs["gpu"][name], outputs["host"][name]) for name in outputs["gpu"])


def test_parameters_show_the_base_while_a_lora_is_applied(model: Any, cache_folder: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled(model, cache_folder, "tensorrt", base_weights="host")
    add_loras(model, TARGETS)
    output_of(model, inputs_of(model))
    after = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(before[name], after[name]) and after[name].is_cuda for name in before)
    model.fuse_lora()
    output_of(model, inputs_of(model))
    model.unfuse_lora()
    output_of(model, inputs_of(model))


def test_a_second_module_loads_from_the_cache(model: Any, tmp_path: Path) -> None:
    compiled(model, str(tmp_path), "tensorrt")
    first = output_of(model, inputs_of(model))
    manifests = {path: path.stat().st_ino for path in tmp_path.rglob("engine.trt")}
    assert len(manifests) == 4
    other = real_shaped_model()
    compiled(other, str(tmp_path), "tensorrt")
    assert torch.equal(output_of(other, inputs_of(other)), first)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("engine.trt")} == manifests


def test_a_corrupt_engine_is_built_again(model: Any, tmp_path: Path) -> None:
    compiled(model, str(tmp_path), "tensorrt")
    first = output_of(model, inputs_of(model))
    victim = next(iter(tmp_path.rglob("engine.trt")))
    victim.write_bytes(victim.read_bytes()[:-100] + b"x" * 100)
    other = real_shaped_model()
    compiled(other, str(tmp_path), "tensorrt")
    assert relative_l2(output_of(other, inputs_of(other)), first) < 1e-2
    assert victim.read_bytes()[-100:] != b"x" * 100


def test_a_bad_engine_is_refused_and_not_stored(model: Any, tmp_path: Path) -> None:
    """With an error bound that nothing can meet, every engine is a bad one."""
    compiled(model, str(tmp_path), "tensorrt")
    module = model._trt_state.module
    module.reconfigure(replace(module.config, error_ratio_bound=0.0))
    with pytest.raises(BuildFailed, match="error"):
        output_of(model, inputs_of(model))
    assert not list(tmp_path.rglob("engine.trt"))


class CancelsAfter(Silent):
    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def cancelled(self) -> bool:
        return time.monotonic() > self._until


@pytest.mark.parametrize("backend", ["tensorrt", "inductor"])
def test_cancel_stops_a_build_at_once(backend: str, model: Any, tmp_path: Path) -> None:
    trt_core.compile_transformer(model, backend=backend, cache_folder=str(tmp_path), progress=CancelsAfter(1.0))
    children = set(psutil.Process().children(recursive=True))
    arguments = inputs_of(model)
    started = time.monotonic()
    with pytest.raises(BuildCancelled):
        output_of(model, arguments)
    assert time.monotonic() - started < 3.0
    if backend == "tensorrt":
        assert not [c for c in set(psutil.Process().children(recursive=True)) - children if "python" in c.name()]
    assert not list(tmp_path.rglob("*.tmp*"))
    for thread in threading.enumerate():
        if thread.name.startswith("trt_core") and thread is not threading.current_thread():
            thread.join(60)
    model._trt_state.module.progress = Silent()
    assert output_of(model, arguments).isfinite().all()


def test_out_of_memory_in_a_refit_keeps_the_weights(cache_folder: str) -> None:
    """The base copies do not fit: nothing was written, and the model computes what it did before."""
    from trt_core.errors import OutOfMemory

    model = tiny_transformer(heads=8, head_dim=128, double=2, single=4).to("cuda", torch.bfloat16)
    compiled(model, cache_folder, "eager", base_weights="gpu")
    arguments = inputs_of(model)
    before = output_of(model, arguments)
    add_loras(model, TARGETS)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
    try:
        with pytest.raises(OutOfMemory, match="base_weights"):
            output_of(model, arguments)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    model.disable_adapters()
    assert torch.equal(output_of(model, arguments), before)
