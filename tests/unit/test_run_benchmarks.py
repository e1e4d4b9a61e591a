"""Runs of scenarios: lines are written as they come, several processes share a file, and a run goes on."""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import fp8_lines, lines, model, process, run, torchao_fp8
from benchmarks.process import Job
from benchmarks.progress import Progress
from benchmarks.scenarios import SCENARIOS, Scenario

CPU = torch.device("cpu")
ABOUT = {"gpu": "Some GPU", "driver": "1", "versions": {"torch": "9"}}
EAGER, OURS, TORCHAO = Scenario("eager", batches=(1, 2)), Scenario("ours", "auto", "gpu", warm=True), Scenario(
    "torchao", precision="fp8", needs="torchao", limit_seconds=7)  # fmt: skip

# -- the file ----------------------------------------------------------------------------------------------------------


def test_several_writers_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: lines.append(path, {"index": index, "long": "x" * 100_000}), range(64)))
    found = lines.read(path)
    assert sorted(line["index"] for line in found) == list(range(64))
    assert all(len(line["long"]) == 100_000 for line in found)
    assert found[0]["measured"].startswith("20")


def test_a_line_is_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(lines.os, "write", lambda file, data: written.append(data))
    lines.append(tmp_path / "x.jsonl", {"long": "x" * 100_000})
    assert len(written) == 1
    assert written[0].endswith(b"\n")


def test_ratios_come_from_the_same_run_batch_and_size_whenever_they_were_written() -> None:
    size = {"run": "a", "batch": 1, "height_px": 1024, "width_px": 1024, "text_tokens": 512}
    ours = {**size, "scenario": "ours", "step_ms": 60.0}
    eager = {**size, "scenario": "eager", "step_ms": 120.0}
    others = [{**eager, **change, "step_ms": 1.0} for change in ({"run": "b"}, {"batch": 2}, {"height_px": 512})]
    (first, *_, last) = lines.with_ratios([ours, *others, eager])
    assert (first["ratio_to_eager"], last["ratio_to_eager"]) == (0.5, 1.0)
    assert "ratio_to_eager" not in lines.with_ratios([ours, *others])[0]


# -- a run -------------------------------------------------------------------------------------------------------------

Children = list[tuple[dict[str, Any], float]]


@pytest.fixture
def invoked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[run.Run, Children]]:
    """A run whose processes are not started: each measures both batches, or what `measured` says."""

    def make(name: str = "a", measured: list[dict[str, Any]] | None = None, **options: Any) -> Any:
        children: Children = []

        def child(job: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
            children.append((job, limit))
            if job.get("warm"):
                yield {"batch": 1, "warm_first_call_seconds": 2.5}
                return
            (Path(job["folder"]) / "cache").mkdir(exist_ok=True)
            yield from measured or [{"batch": batch, "step_ms": 10.0 * batch} for batch in (1, 2)]

        monkeypatch.setattr(run, "child", child)
        args = types.SimpleNamespace(run=name, results=tmp_path, limit=100.0, skip_references=False, tiny=False)
        args.__dict__.update(options)
        return run.Run(args, tmp_path / "folder", ABOUT), children

    return make


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return lines.read(tmp_path / "some-gpu.jsonl")


def test_a_run_goes_on_where_it_was(invoked: Any, tmp_path: Path, capsys: Any) -> None:
    first, _ = invoked(measured=[{"batch": 1, "step_ms": 10.0}, {"batch": 2, "step_ms": 1.0, "incomplete": True}])
    first.measure(EAGER)
    second, children = invoked()
    second.measure(EAGER)
    assert len(children) == 1, "batch 2 was not complete"
    second.measure(EAGER)
    assert len(children) == 1
    assert "some-gpu.jsonl has it already" in capsys.readouterr().err
    other, others = invoked("b")
    other.measure(EAGER)
    assert len(others) == 1
    assert [line["run"] for line in written(tmp_path)] == ["a"] * 4 + ["b"] * 2


def test_lines_are_written_as_they_come(invoked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this, _ = invoked()

    def stopped(job: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
        yield {"batch": 1, "step_ms": 10.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "child", stopped)
    with pytest.raises(KeyboardInterrupt):
        this.measure(EAGER)
    (line,) = written(tmp_path)
    assert (line["run"], line["scenario"], line["step_ms"], line["gpu"]) == ("a", "eager", 10.0, "Some GPU")


def test_a_warm_call_is_added_to_the_first_line(invoked: Any, tmp_path: Path) -> None:
    this, children = invoked(measured=[{"batch": 1, "step_ms": 10.0}])
    this.measure(OURS)
    assert [bool(job.get("warm")) for job, _ in children] == [False, True]
    assert (written(tmp_path)[-1]["step_ms"], written(tmp_path)[-1]["warm_first_call_seconds"]) == (10.0, 2.5)
    this.measure(OURS)
    assert len(children) == 2


def test_what_is_not_installed_is_left_out_and_has_its_own_limit(
    invoked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    this, children = invoked()
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    this.measure(TORCHAO)
    assert capsys.readouterr().err == "torchao-fp8 is left out: torchao is not installed.\n"
    assert (children, written(tmp_path)) == ([], [])
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(run, "version", lambda name: "0.18.0")
    this.measure(TORCHAO)
    assert children[0][1] == 7
    assert written(tmp_path)[0]["versions"] == {"torch": "9", "torchao": "0.18.0"}


def test_references_are_written_once_and_not_where_they_shall_not(invoked: Any, tmp_path: Path) -> None:
    skipping, children = invoked(skip_references=True)
    skipping.references()
    writing, others = invoked()
    writing.references()
    (tmp_path / "folder" / "reference_adversarial.pt").touch()
    writing.references()
    assert (len(children), len(others)) == (0, 1)


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_process_is_stopped_at_its_limit_and_its_lines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path, """echo noise; echo 'LINE {"batch": 1}'; exec sleep 60"""))
    started = time.perf_counter()
    assert list(run.child({}, 0.5)) == [{"batch": 1}]
    assert time.perf_counter() - started < 20
    assert "stopped at its limit of 0 s" in capsys.readouterr().err


def test_a_process_that_fails_is_said_and_one_that_ends_late_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path, "exit 3"))
    assert list(run.child({}, 30)) == []
    assert "FAILED (exit code 3)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "executable", program(tmp_path, "echo 'LINE {}'; exec 1>&-; sleep 0.3"))
    assert list(run.child({}, 30)) == [{}]
    assert capsys.readouterr().err == ""


# -- a process ---------------------------------------------------------------------------------------------------------


def job_of(tmp_path: Path, scenario: Scenario) -> Job:
    return Job(scenario, tmp_path, tmp_path, CPU, Progress(scenario.name, time.time()), tiny=True)


def test_a_scenario_is_measured_against_the_references(tmp_path: Path) -> None:
    process.write_references(job_of(tmp_path, Scenario("references")))
    assert not list(tmp_path.glob("*.[0-9]*")), "nothing is left of the files that were renamed"
    early, first, second = process.measure(job_of(tmp_path, Scenario("eager", batches=(1, 2))))
    assert (early["incomplete"], "error_ratio" in early) == (True, False)
    assert (first["error_ratio"], first["batch"], second["batch"]) == (pytest.approx(1), 1, 2)
    assert "first_call_seconds" not in second
    early, ours = process.measure(job_of(tmp_path, Scenario("ours", "eager", "gpu", lora=True, precision="fp8")))
    assert 0.5 < ours["error_ratio"] < 1.5
    assert ours["lora_layers"] == 40
    assert json.loads(json.dumps(ours)) == ours


def test_a_process_says_what_it_does(capsys: Any) -> None:
    with Progress("x", time.time()).phase("first call", every_seconds=0.05):
        time.sleep(0.2)
    begun, *still, done = capsys.readouterr().err.splitlines()
    assert begun.endswith("s: first call")
    assert still
    assert all("first call: still at it; " in line for line in still)
    assert "first call: done" in done


# -- torchao -----------------------------------------------------------------------------------------------------------


def test_torchao_quantizes_what_ours_multiplies_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear layer of a block but modulations, per row, and without minutes of tuning."""
    asked: dict[str, Any] = {}

    def config(**options: Any) -> dict[str, Any]:
        return asked.update(options) or options

    def quantize_(transformer: nn.Module, _: Any, filter_fn: Callable[[nn.Module, str], bool]) -> None:
        asked["names"] = [name for name, module in transformer.named_modules() if filter_fn(module, name)]

    fake = types.SimpleNamespace(
        quantize_=quantize_, Float8DynamicActivationFloat8WeightConfig=config, PerRow=lambda: "per row"
    )
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    transformer = model.full_size_transformer(CPU, **fp8_lines.TINY)
    assert torchao_fp8.quantize(transformer) == len(asked["names"]) == 2 * 12 + 2 * 5
    assert not any("norm" in name or "embed" in name for name in asked["names"])
    assert (asked["granularity"], asked["set_inductor_config"]) == ("per row", False)


def test_the_competitor_cannot_eat_a_run() -> None:
    (torchao,) = (scenario for scenario in SCENARIOS if scenario.scenario == "torchao")
    assert (torchao.batches, torchao.precision, torchao.needs) == ((1, 2), "fp8", "torchao")
    assert torchao.limit_seconds is not None
    assert torchao.limit_seconds <= 200


@pytest.mark.parametrize(("left", "warm", "said"), [(0.2, False, True), (60.0, False, False), (0.2, True, False)])
def test_a_process_that_is_stopped_has_said_how_long_its_first_call_took(
    left: float, warm: bool, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = process.Job(
        EAGER, tmp_path, tmp_path, torch.device("cpu"), Progress("it"), warm, ends=time.time() + 5.0 + left
    )
    with process.known_when_stopped(job, 2):
        time.sleep(0.6)
    out = capsys.readouterr().out
    assert out.startswith("LINE ") is said
    if said:
        line = json.loads(out.removeprefix("LINE "))
        assert 0.15 < line.pop("first_call_seconds_at_least") < 0.6
        assert line == {"batch": 2, "incomplete": True}
