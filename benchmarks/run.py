"""`python -m benchmarks.run`: every scenario in its own process; one JSON line per scenario and batch.

A run can go on: what its file has already is left out. Two of them with one `--run` and `--folder` may run side by side
on two GPUs of a host (CUDA_VISIBLE_DEVICES), each with scenarios of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .lines import RESULTS, Line, append, file_name, read, with_ratios
from .scenarios import Scenario, named


def child(job: Line, limit_seconds: float) -> Iterator[Line]:
    """The lines of one process, each as it comes; what it says otherwise goes to standard error. A failure is said, not
    hidden."""
    started, job = time.time(), {**job, "limit_seconds": limit_seconds}
    command = [sys.executable, "-m", "benchmarks.process", json.dumps({**job, "started": started})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(limit_seconds, process.kill)
    timer.start()
    try:
        for text in process.stdout or ():
            if text.startswith("LINE "):
                yield json.loads(text[5:])
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()  # nothing where it has ended
    seconds = time.time() - started
    if code:
        why = f"stopped at its limit of {limit_seconds:.0f} s" if seconds >= limit_seconds else f"exit code {code}"
        sys.stderr.write(f"FAILED ({why}) after {seconds:.0f} s: {command[-1]}\n")


class Run:
    """One invocation: where its scenarios work, and the file that it shares with others."""

    def __init__(self, args: argparse.Namespace, folder: Path, about: Line) -> None:
        self._args, self._folder, self._about = args, folder, about
        self._path = args.results / file_name(about["gpu"])

    def references(self) -> None:
        """fp32's outputs, where nobody has written them yet."""
        if not self._args.skip_references and not (self._folder / "reference_adversarial.pt").exists():
            any(child({**self._job(Scenario("references")), "write_references": True}, self._args.limit))

    def measure(self, scenario: Scenario) -> None:
        """Appends what is missing of this scenario, each line as soon as it is there."""
        if scenario.needs and importlib.util.find_spec(scenario.needs) is None:
            sys.stderr.write(f"{scenario.name} is left out: {scenario.needs} is not installed.\n")
            return
        limit = min(self._args.limit, scenario.limit_seconds or self._args.limit)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder / scenario.name / "inductor")
        done = complete(scenario, self._lines())
        if len(done) < len(scenario.batches):
            for line in child(self._job(scenario), limit):
                self._write(scenario, line)
        elif not scenario.warm or "warm_first_call_seconds" in done[0]:
            sys.stderr.write(f"{scenario.name}: {self._path.name} has it already.\n")
        self._measure_warm(scenario, limit)

    def _measure_warm(self, scenario: Scenario, limit: float) -> None:
        """The first line again with the first call of a second process, which finds what the first one has compiled."""
        done = complete(scenario, self._lines())
        cached = any((self._folder / scenario.name / kind).exists() for kind in ("inductor", "cache"))
        if scenario.warm and done and "warm_first_call_seconds" not in done[0] and cached:
            for line in child({**self._job(scenario), "warm": True}, limit):
                self._write(scenario, {**done[0], **line})

    def _job(self, scenario: Scenario) -> Line:
        # Inductor keeps compiled kernels between processes: an own folder per scenario makes the first call a cold one.
        own = self._folder / scenario.name
        own.mkdir(parents=True, exist_ok=True)
        return {"scenario": scenario.to_dict(), "folder": str(own), "references": str(self._folder),
                "tiny": self._args.tiny}  # fmt: skip

    def _lines(self) -> list[Line]:
        """This run's, whoever wrote them."""
        return [line for line in read(self._path) if line["run"] == self._args.run]

    def _write(self, scenario: Scenario, measured: Line) -> None:
        versions = {**self._about["versions"], **({scenario.needs: version(scenario.needs)} if scenario.needs else {})}
        tiny = {"tiny": True} if self._args.tiny else {}
        line = {"run": self._args.run, **tiny, **scenario.fields(), **measured, **self._about, "versions": versions}
        append(self._path, line)
        sys.stdout.write(_summary(scenario, with_ratios([*self._lines(), line])[-1]) + "\n")
        sys.stdout.flush()


def complete(scenario: Scenario, lines: Sequence[Line]) -> list[Line]:
    """The scenario's last complete line of each batch, in the order of its batches."""
    fields = scenario.fields().items()
    found = {line["batch"]: line for line in lines if fields <= _hashable(line) and not line.get("incomplete")}
    return [found[batch] for batch in scenario.batches if batch in found]


def _hashable(line: Line) -> set[tuple[str, Any]]:
    return {(name, value) for name, value in line.items() if not isinstance(value, (dict, list))}


def machine() -> Line:
    """GPU, driver and versions, asked in a process of its own so that this one holds no GPU memory."""
    code = "import json; from trt_core.gpu import environment; print(json.dumps(environment()))"
    found = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1])
    versions = {k: found[k] for k in ("torch", "torch_tensorrt", "tensorrt", "triton", "cuda")}
    versions["diffusers"] = version("diffusers")
    return {"gpu": found["gpu"], "driver": found["driver"], "versions": versions}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="names, or starts of names; all by default")
    parser.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results; with --tiny, a temporary folder")
    parser.add_argument(
        "--folder", type=Path, help="keeps caches and references here, for another part of the same run"
    )
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one process")
    parser.add_argument("--skip-references", action="store_true", help="compute no outputs in fp32 here: errors are "
                        "measured where --folder has them by then")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a small model on whatever device there is, as a self-test")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="flux_benchmark_"))
    args.results = args.results or (folder / "results" if args.tiny else RESULTS)
    run = Run(args, folder, machine())
    run.references()
    for scenario in named(args.scenarios):
        run.measure(scenario)


_SHOWN = (
    "step_ms", "ratio_to_eager", "first_call_seconds", "warm_first_call_seconds", "lora_switch_ms", "lora_refit_ms",
    "lora_first_ms", "lora_step_ms", "plan_bytes", "host_peak_bytes_above_weights", "gpu_peak_bytes", "error_ratio",
)  # fmt: skip


def _summary(scenario: Scenario, line: Line) -> str:
    values = [f"{name} {line[name]:.4g}" for name in _SHOWN if name in line]
    return f"{scenario.name} b{line['batch']}: " + ", ".join(values)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process that measures is stopped then, too
    main()
