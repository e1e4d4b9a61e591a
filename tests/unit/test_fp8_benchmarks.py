"""The FP8 measurements compute what they say, and under a budget the GPU never holds the model in full size."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trt_core
from benchmarks import fp8_budget, fp8_euler, fp8_lines, fp8_loras, fp8_quality, model
from benchmarks.fake_quant import FakeAttention
from benchmarks.fp8_calls import at, call, exact
from benchmarks.process import relative
from benchmarks.wide import widened
from tests.unit.fp8_simulation import fused_layers
from trt_core import block_precisions, diffusers_binding, fp8_model, host_slabs, mutable_module
from trt_core.config import BaseWeights
from trt_core.diffusers_binding import Slot
from trt_core.fp8_weights import BasePlace
from trt_core.host import Silent

CPU = torch.device("cpu")
SMALL = {**fp8_lines.TINY, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
         "axes_dims_rope": (8, 12, 12)}  # fmt: skip
OPTIONS = {"backend": "eager", "progress": Silent()}


@pytest.fixture
def small() -> Any:
    return model.full_size_transformer(CPU, fp8_quality.BRANCH_GAIN, **SMALL)


def call_of(transformer: Any) -> dict[str, Tensor]:
    return model.inputs(transformer, 1, 64, 64, 8)


def wide_copy(transformer: Any) -> Any:
    return copy.deepcopy(transformer).float()


# -- models, calls and steps -------------------------------------------------------------------------------------------


def test_the_gain_scales_the_ends_of_residual_branches_alone(small: Any) -> None:
    other = model.full_size_transformer(CPU, **SMALL)
    ratios = {n: float(p.float().norm() / q.float().norm())
              for (n, p), q in zip(other.named_parameters(), small.parameters(), strict=True)}  # fmt: skip
    ends = {n for n in ratios if n.endswith(("to_out.0.weight", "to_add_out.weight", "net.2.weight"))}
    ends.add("single_transformer_blocks.0.proj_out.weight")
    assert all(ratios[n] == pytest.approx(4, rel=1e-3) for n in ends)
    assert all(ratios[n] == 1 for n in ratios.keys() - ends)


@torch.no_grad()
def test_loras_have_the_size_asked_for(small: Any) -> None:
    for name, size in (("a", 0.005), ("b", 0.05)):
        model.add_loras(small, 4, (name,), size)
    for layer in (m for m in small.modules() if hasattr(m, "lora_A")):
        for name, size in (("a", 0.005), ("b", 0.05)):
            delta = layer.lora_B[name].weight.detach().float() @ layer.lora_A[name].weight.float() * layer.scaling[name]
            assert float(delta.norm() / layer.base_layer.weight.float().norm()) == pytest.approx(size, rel=5e-3)


def test_the_exact_call_has_the_times_that_a_host_rounds(small: Any) -> None:
    arguments = at(call_of(small), torch.zeros(1, 16, 64), 0.95)
    assert float(exact(arguments)["timestep"] * 1000) == 948
    assert exact(arguments)["hidden_states"].dtype is torch.float32


def test_steps_go_from_one_to_zero() -> None:
    start, sigmas = torch.full((4,), 3.0), []

    def velocity(latent: Tensor, sigma: float) -> Tensor:
        sigmas.append(sigma)
        return latent

    latents = fp8_euler.trajectory(velocity, start)
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, pytest.approx(0.05), 20)
    assert torch.allclose(latents[-1], start * 0.95**20)
    assert torch.allclose(fp8_euler.trajectory(lambda x, sigma: torch.ones(4), start)[-1], start - 1)


class Disturbed:
    """A model whose outputs are off by `error`, by the same tensor each time or by another one."""

    def __init__(self, wide: Any, error: float, fixed: bool) -> None:
        self._wide, self._error, self._fixed = wide, error, fixed
        self._random = torch.Generator().manual_seed(5)
        self._offset: Tensor | None = None

    def __call__(self, **arguments: Any) -> tuple[Tensor]:
        truth = self._wide(**arguments)[0]
        if self._offset is None or not self._fixed:
            self._offset = torch.randn(truth.shape, generator=self._random)
        return (truth + self._offset * (self._error * truth.norm() / self._offset.norm()),)


@pytest.mark.parametrize("fixed", [False, True])
def test_errors_that_repeat_are_told_from_noise(small: Any, fixed: bool) -> None:
    """Independent errors add up to the noise's curve; the same error at each step to sqrt(20) of it."""
    wide = wide_copy(small)
    arguments = {n: v.float() for n, v in model.inputs(small, 1, 128, 128, 8).items()}
    line = fp8_euler.euler_line(Disturbed(wide, 0.01, fixed), fp8_euler.ExactWay.of(wide, arguments))
    assert line["step_errors"] == pytest.approx([0.01] * 20, rel=1e-2)
    assert line["last_ratio_to_noise"] == pytest.approx(math.sqrt(20) if fixed else 1, rel=0.15)
    assert line["growth"] == pytest.approx(line["last_ratio_to_noise"], rel=0.15)
    assert line["largest_ratio_to_noise"] >= line["last_ratio_to_noise"]


def test_eager_as_if_it_were_fp8_is_measured_as_eager(small: Any) -> None:
    arguments = call_of(small)
    line, truth = fp8_quality.reference(small, widened(small), arguments, adversarial=True)
    seen = fp8_quality.forward_line("adversarial", call(small, arguments), line, truth, False)
    assert (seen["error"], seen["cosine"]) == (line["eager_error"], line["eager_cosine"])
    assert seen["ratio_to_simulated"] == line["eager_error"] / line["simulated_error"] < 1
    assert fp8_quality.forward_line("plain", truth, line, truth, False)["error"] == 0


# -- LoRAs -------------------------------------------------------------------------------------------------------------


def test_the_gain_is_the_part_that_arrives() -> None:
    random = torch.Generator().manual_seed(0)
    r = [torch.randn(1, 50, 64, generator=random) for _ in range(4)]
    whole = fp8_loras.gain([[(x, x) for x in r[:2]], [(x, x) for x in r[2:]]])
    assert (whole["gain"], whole["cosine"]) == (pytest.approx(1), pytest.approx(1))
    assert fp8_loras.gain([[(0.2 * x, x) for x in r]])["gain"] == pytest.approx(0.2)
    across = fp8_loras.gain([[(3 * one, two) for one, two in ((r[0], r[1]), (r[2], r[3]))]])
    assert abs(across["cosine"]) < 0.1


def test_a_single_bit_is_noticed(small: Any, tmp_path: Path) -> None:
    trt_core.quantize_fp8_(small)
    ours = trt_core.compile_transformer(small, cache_folder=str(tmp_path), **OPTIONS)
    output = call(ours, call_of(ours))
    before = fp8_loras.Bits(ours, output)
    assert before.differences(ours, output) == {"different_weights": 0, "same_output": True}
    fp8_loras.bound(ours)["single_blocks.0.linear2.weight"].view(torch.uint8)[3, 5] ^= 1
    fp8_loras.bound(ours)["double_blocks.0.img_mlp.0.weight_scale"][7] *= 1.5
    assert before.differences(ours, -output) == {"different_weights": 2, "same_output": False}


def test_every_kind_of_line(tmp_path: Path) -> None:
    options = {**OPTIONS, "cache_folder": str(tmp_path)}
    lines = list(fp8_quality.measure(CPU, 64, 8, options, SMALL))
    assert [line["kind"] for line in lines] == ["forward"] * 2 + ["lora_gain"] * 3 + ["lora_switch", "euler", "euler"]
    for gains in (line for line in lines if line["kind"] == "lora_gain"):
        assert len(set(gains["gains"])) == gains["loras"] == fp8_loras.LORAS[gains["delta"]], "each LoRA is another"
        assert min(gains["gains"]) < gains["gain"] < max(gains["gains"])
        assert 0 < gains["gain_standard_error"] < max(gains["gains"]) - min(gains["gains"])
    plain, adversarial, *gains, switch, euler, corrected = lines
    assert 0 < plain["eager_error"] < plain["error"] < adversarial["error"]
    assert plain["ratio_to_simulated"] == pytest.approx(1, abs=0.2)
    assert 0 < euler["largest_ratio_to_simulated"] < 5
    assert [line.get("corrected") for line in (euler, corrected)] == [None, True]
    assert corrected["latent_errors"] != euler["latent_errors"]
    assert corrected["last_ratio_to_noise"] < 1.1 * euler["last_ratio_to_noise"]
    assert [line["delta"] for line in gains] == [0.005, 0.01, 0.05]
    assert gains[-1]["gain"] == pytest.approx(1, abs=0.3)
    same = {"different_weights": 0, "same_output": True}
    assert switch["a_to_none"] == switch["a_to_b"] == switch["after_switches"] == same
    assert (switch["switches_same_output"], switch["pairs_of_different_outputs"]) == (20, "6 of 6")
    assert json.loads(json.dumps(lines)) == lines


def test_lines_are_appended_under_the_gpus_name(tmp_path: Path) -> None:
    about = {"gpu": "NVIDIA H200", "driver": "580", "versions": {}}
    for kind in ("forward", "euler"):
        path = fp8_lines.append(tmp_path / "fp8", [{"run": "a", "kind": kind}], about)
    assert path == tmp_path / "fp8" / "nvidia-h200.jsonl"
    assert [json.loads(text)["kind"] for text in path.read_text().splitlines()] == ["forward", "euler"]


# -- the budget --------------------------------------------------------------------------------------------------------


def test_the_budget_runs_from_start_to_end(tmp_path: Path) -> None:
    early, line = fp8_budget.measure(CPU, 16, 64, 8, {**OPTIONS, "cache_folder": str(tmp_path)}, SMALL)
    assert early.pop("incomplete")
    assert "lora_refit_ms" not in early
    assert early == {name: line[name] for name in early}
    assert line["lora_layers"] == 20
    assert line["step_ms"] > 0
    layers = fused_layers(model.full_size_transformer(CPU, **SMALL)).values()
    assert line["base_host_bytes"] == sum(2 * layer.weight.numel() for group in layers for layer in group)
    assert "peak_allocated_bytes" not in line, "there is no GPU here to measure"
    assert "lora_refit_ms" in line


class DeviceBytes(TorchDispatchMode):
    """Bytes of tensors on PyTorch's meta device, which plays the GPU: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def _parameter(slot: Slot) -> Any:
    return slot.parameter()


@pytest.fixture
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseWeights], None]:
    """Lets the meta device be a GPU: bases are placed as asked for, and its tensors are not refused as missing."""
    monkeypatch.setattr(host_slabs, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(diffusers_binding, "_present", _parameter)
    # Norms have no values there to be read; none that lets attention be in E4M3.
    monkeypatch.setattr(block_precisions, "_quiet_blocks", lambda blocks, tensors: set(), raising=False)

    def place(where: BaseWeights) -> None:
        for module in (fp8_model, mutable_module):
            monkeypatch.setattr(module, "base_place", lambda mode, arch, recipe, device, given_there: BasePlace(
                where if device.type == "meta" else BaseWeights.GPU, 2**30))  # fmt: skip

    return place


@pytest.mark.parametrize("where", [BaseWeights.HOST, BaseWeights.GPU])
def test_the_gpu_never_holds_the_model_in_full_size(
    where: BaseWeights, meta_gpu: Callable[[BaseWeights], None], tmp_path: Path
) -> None:
    """From host memory to the GPU, bound, with a LoRA, with another, bound again: FP8, biases, and one layer's
    temporaries. Bases on the GPU are the control: there the same count sees the full size."""
    meta_gpu(where)
    tensors = model.full_size_transformer(CPU, **{**fp8_lines.TINY, "num_layers": 4, "num_single_layers": 12})
    linears = [layer.weight for layers in fused_layers(tensors).values() for layer in layers]
    fp8_bytes, largest = sum(w.numel() for w in linears), max(w.numel() for w in linears)
    others = sum(p.nbytes for p in tensors.parameters()) - 2 * fp8_bytes
    trt_core.quantize_fp8_(tensors)
    ours: Any = trt_core.compile_transformer(tensors, base_weights=where, cache_folder=str(tmp_path), **OPTIONS)
    with DeviceBytes() as device_bytes, torch.no_grad():
        ours.to("meta")
        assert device_bytes.now == (others if where is BaseWeights.HOST else others + 2 * fp8_bytes)
        assert ours._trt_state.prepare()
        model.add_loras(ours, 4) if where is BaseWeights.HOST else None
        for name in ("a", "b") if where is BaseWeights.HOST else ():
            ours.set_adapters(name)
            assert ours._trt_state.prepare()
            assert ours.trt_report().last_refit.merged > 0
        ours.to("meta")
        assert ours._trt_state.prepare()
    # What is merged is fp32 on PyTorch's way, beside its delta and its base; scales are a hundredth.
    bound = 1.15 * fp8_bytes + others + 20 * largest
    assert bound < 2 * fp8_bytes
    assert (device_bytes.most <= bound) is (where is BaseWeights.HOST)


def test_simulated_attention_rounds_and_does_nothing_else() -> None:
    """Every operand matters, and the order of heads and tokens does."""
    q, k, v = (torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    exact_output = torch.nn.functional.scaled_dot_product_attention(q, k, v * 50)
    with FakeAttention():
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v * 50)
        keywords = torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=v * 50)
    assert torch.equal(seen, keywords)
    assert 0.02 < relative(seen, exact_output) < 0.08
    grid = [x.to(torch.float8_e4m3fn).float() for x in (q, k)]
    with FakeAttention():
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(*grid, v * 50), seen)
        assert not torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v * 70), seen)


def test_the_recipes_own_simulation_is_the_yardstick() -> None:
    line = {f"{name}_error": value for name, value in
            (("simulated", 0.02), ("simulated_attention", 0.04), ("simulated_fp32", 0.01))}  # fmt: skip
    truth = torch.ones(4)
    for fp8_attention, expected in ((False, 5.0), (True, 2.5)):
        found = fp8_quality.forward_line("plain", truth * 1.1, line, truth, fp8_attention)
        assert found["ratio_to_recipe"] == pytest.approx(expected)
