"""A LoRA that drives layers past their static FP8 ranges: found in the first step, named once, and costing nothing
else."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tests.unit.diffusers_pair import lora
from tests.unit.fp8_bound import add
from tests.unit.fp8_simulation import Scheme, compiled_fp8, fused_layers, largest_inputs, simulation
from tests.unit.test_inductor import graphs
from tests.unit.tiny_flux import call_inputs, run_diffusers, tiny_transformer
from trt_core import range_check
from trt_core.range_check import range_words

HARMLESS = 464 / 448
"""Up to here E4M3 rounds to its largest number."""
STRENGTH = 40.0
"""Of a LoRA on the first layer of the MLPs: what it feeds to the second leaves the range."""
DRIVEN = {f"double_blocks.{i}.{stream}_mlp.2" for i in range(2) for stream in ("img", "txt")}


@pytest.fixture(scope="module")
def plain() -> FluxTransformer2DModel:
    return tiny_transformer()


@pytest.fixture(scope="module")
def amax(plain: FluxTransformer2DModel) -> dict[str, float]:
    return largest_inputs(plain, [call_inputs(plain)])


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trt_core.fp8")


def driven(model: FluxTransformer2DModel, strength: float = STRENGTH) -> None:
    add(model, "wild", lora("ff.net.0.proj", "ff_context.net.0.proj"))
    model.set_adapters("wild", strength)


def ranges(scheme: Scheme) -> dict[str, float]:
    return {name: amax * scheme.headroom for name, amax in (scheme.input_amax or {}).items()}


def beyond(model: FluxTransformer2DModel, scheme: Scheme) -> dict[str, float]:
    """The same by the simulation: what goes into each layer of the model with its LoRA fused, in ranges."""
    fused = copy.deepcopy(model)
    fused.fuse_lora()
    limits = ranges(scheme)
    seen = largest_inputs(simulation(fused, scheme), [call_inputs(model)])
    times = {name: seen[name] / limits[name] for name in limits if not name.endswith("mod.lin") and "modul" not in name}
    return {name: value for name, value in times.items() if value > HARMLESS}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- what is found -----------------------------------------------------------------------------------------------------


def test_layers_and_by_how_much(plain: Any, amax: Any, tmp_path: Path, caplog: Any) -> None:
    scheme = Scheme(input_amax=amax)
    theirs = copy.deepcopy(plain)
    driven(theirs)
    expected = beyond(theirs, scheme)
    ours = compiled_fp8(copy.deepcopy(plain), scheme, tmp_path)
    driven(ours)
    run_diffusers(ours, call_inputs(ours))
    found = ours.trt_report().out_of_range
    assert set(found) >= DRIVEN
    assert found == pytest.approx(expected, rel=0.03)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    (warning,) = warnings(caplog)
    worst = next(iter(found))
    assert f"{worst} ({found[worst]:.3g} times its range)" in warning
    for word in ("calibrate again", "headroom now 2", "dynamic activations", f"{len(found) - 3} more"):
        assert word in warning


def test_calibrated_inputs_fit_without_any_headroom(plain: Any, amax: Any, tmp_path: Path, caplog: Any) -> None:
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(input_amax=amax, headroom=1.0), tmp_path)
    run_diffusers(ours, call_inputs(ours))
    assert ours.trt_report().out_of_range == {}
    assert warnings(caplog) == []
    (line,) = [r.getMessage() for r in caplog.records if "of their static ranges" in r.getMessage()]
    assert 95 < int(line.partition(" %")[0].rpartition(" ")[2]) <= 104


FIRST = "double_blocks.0.img_attn.qkv"
"""Nothing in FP8 comes before it but its modulation."""


@pytest.mark.parametrize(("times", "named"), [(1.03, False), (1.05, True)])
def test_what_rounds_to_the_largest_number_counts_as_inside(
    times: float, named: bool, plain: Any, amax: Any, tmp_path: Path
) -> None:
    tight = {name: 2 * value for name, value in amax.items()} | {FIRST: amax[FIRST] / times}
    scheme = Scheme(input_amax=tight, headroom=1.0, patterns=("*_mod.lin",))
    ours = compiled_fp8(copy.deepcopy(plain), scheme, tmp_path)
    run_diffusers(ours, call_inputs(ours))
    assert ours.trt_report().out_of_range == (pytest.approx({FIRST: times}, rel=1e-5) if named else {})


def test_once_per_change(plain: Any, amax: Any, tmp_path: Path, caplog: Any) -> None:
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(input_amax=amax), tmp_path)
    inputs = call_inputs(ours)
    driven(ours)
    for _ in range(3):
        run_diffusers(ours, inputs)
    assert len(warnings(caplog)) == 1
    ours.set_adapters("wild", 0.01)
    run_diffusers(ours, inputs)
    assert ours.trt_report().out_of_range == {}
    ours.set_adapters("wild", STRENGTH)
    run_diffusers(ours, inputs)
    assert set(ours.trt_report().out_of_range) >= DRIVEN
    ours.disable_adapters()
    run_diffusers(ours, inputs)
    assert ours.trt_report().out_of_range == {}
    assert len(warnings(caplog)) == 2


def test_excluded_layers_are_not_named(plain: Any, amax: Any, tmp_path: Path) -> None:
    patterns = ("double_blocks.0.*", "double_blocks.1.txt_mlp.2")
    left_out = {n for n in fused_layers(plain) if n.startswith("double_blocks.0.")} | {patterns[1]}
    scheme = Scheme(input_amax=amax, patterns=patterns, excluded=frozenset(left_out))
    ours = compiled_fp8(copy.deepcopy(plain), scheme, tmp_path)
    driven(ours)
    run_diffusers(ours, call_inputs(ours))
    found = set(ours.trt_report().out_of_range)
    assert "double_blocks.1.img_mlp.2" in found
    assert not found & left_out


# -- what stays as it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_keep_their_bits(dtype: torch.dtype, plain: Any, amax: Any, tmp_path: Path) -> None:
    """The first step after a change, which is looked at, and the second, which is not."""
    ours = compiled_fp8(copy.deepcopy(plain).to(dtype), Scheme(input_amax=amax), tmp_path)
    inputs = call_inputs(ours, batch=2)
    driven(ours)
    assert torch.equal(run_diffusers(ours, inputs), run_diffusers(ours, inputs))
    assert set(ours.trt_report().out_of_range) >= DRIVEN


def test_inductor_compiles_nothing_for_it(tmp_path: Path) -> None:
    model = tiny_transformer(double=1, single=1)
    scheme = Scheme(input_amax=largest_inputs(model, [call_inputs(model)]))
    ours = compiled_fp8(copy.deepcopy(model), scheme, tmp_path, backend="inductor")
    inputs = call_inputs(ours)
    run_diffusers(ours, inputs)
    before = graphs()
    driven(ours)
    first = run_diffusers(ours, inputs)
    assert torch.equal(first, run_diffusers(ours, inputs))
    assert graphs() == before
    assert {"double_blocks.0.img_mlp.2", "double_blocks.0.txt_mlp.2"} <= set(ours.trt_report().out_of_range)


def test_dynamic_scales_are_not_looked_at(plain: Any, tmp_path: Path, caplog: Any) -> None:
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), tmp_path)
    driven(ours)
    run_diffusers(ours, call_inputs(ours))
    ours.set_adapters("wild", STRENGTH / 2)
    ours._trt_state.prepare()
    blocks = ours._trt_state.module.blocks_for(1, 40, 7)
    assert all(block is blocks.compiled.double for block in blocks.double)
    assert all(block is blocks.compiled.single for block in blocks.single)
    assert ours.trt_report().out_of_range == {}
    assert warnings(caplog) == []


def test_static_blocks_run_unwatched_after_the_first_step(plain: Any, amax: Any, tmp_path: Path) -> None:
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(input_amax=amax), tmp_path)
    run_diffusers(ours, call_inputs(ours))
    blocks = ours._trt_state.module.blocks_for(1, 40, 7)
    assert all(block is blocks.compiled.double for block in blocks.double)
    assert all(block is blocks.compiled.single for block in blocks.single)


def test_without_memory_for_it_the_step_runs_all_the_same(
    plain: Any, amax: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(*_args: Tensor, mask: Tensor | None = None) -> Tensor:
        raise torch.OutOfMemoryError("provoked")

    ours = compiled_fp8(copy.deepcopy(plain), Scheme(input_amax=amax), tmp_path)
    driven(ours)
    with monkeypatch.context() as patched:
        patched.setattr(range_check, "attend", attend)
        first = run_diffusers(ours, call_inputs(ours))
    assert torch.equal(first, run_diffusers(ours, call_inputs(ours)))
    assert ours.trt_report().out_of_range == {}
    (warning,) = warnings(caplog)
    assert "not enough GPU memory" in warning


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, ""),
        ({"a": 2.06}, "a (2.06 times its range):"),
        ({"a": 9.0, "b": 3.0, "c": 2.0}, "a (9 times its range), b (3 times its range), c (2 times its range):"),
        (dict.fromkeys("abcde", 2.0), "c (2 times its range), 2 more:"),
    ],
)
def test_words(found: Mapping[str, float], words: str) -> None:
    assert words in range_words(found)
    assert bool(range_words(found)) is bool(found)
