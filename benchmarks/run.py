"""`python -m benchmarks.run`: every scenario in its own process; one JSON line per scenario and batch."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .lines import RESULTS, file_name
from .scenarios import Scenario, named


def child(job: dict[str, Any], limit_seconds: float) -> list[dict[str, Any]]:
    """The lines of one process; what it says otherwise goes to standard error. A failure is said, not hidden."""
    command = [sys.executable, "-m", "benchmarks.process", json.dumps(job)]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit_seconds, check=False)
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        output, code = (expired.stdout or b"").decode(), f"stopped after {limit_seconds:.0f} s"
    if code:
        sys.stderr.write(f"FAILED ({code}) after {time.perf_counter() - started:.0f} s: {command[-1]}\n")
    return [json.loads(line[5:]) for line in output.splitlines() if line.startswith("LINE ")]


def run_scenario(scenario: Scenario, folder: Path, limit_seconds: float) -> list[dict[str, Any]]:
    job = {"scenario": scenario.to_dict(), "folder": str(folder / scenario.name), "warm": False}
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    for reference in folder.glob("reference_*.pt"):
        link = Path(job["folder"]) / reference.name
        if not link.exists():
            os.symlink(reference, link)
    # Inductor keeps compiled kernels between processes: an own folder per scenario makes the first call a cold one.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / scenario.name / "inductor")
    lines = child(job, limit_seconds)
    if scenario.warm and lines:
        for warm in child({**job, "warm": True}, limit_seconds):
            lines[0] |= warm
    return [_complete(scenario, line) for line in lines]


def _complete(scenario: Scenario, measured: dict[str, Any]) -> dict[str, Any]:
    line = {
        "scenario": scenario.scenario, "backend": scenario.backend, "precision": scenario.precision,
        "height_px": scenario.height_px, "width_px": scenario.width_px, "text_tokens": scenario.text_tokens,
        "base_weights": scenario.base_weights, **measured,
    }  # fmt: skip
    return {name: value for name, value in line.items() if value is not None}


def ratios(lines: list[dict[str, Any]], known: list[dict[str, Any]]) -> None:
    """Adds `ratio_to_eager` to each line: its step against eager's of the same run, batch and size."""
    for line in lines:
        for other in (*lines, *known):
            same = all(other.get(k) == line.get(k) for k in ("run", "batch", "height_px", "width_px", "text_tokens"))
            if other["scenario"] == "eager" and same and "step_ms" in other and "step_ms" in line:
                line["ratio_to_eager"] = line["step_ms"] / other["step_ms"]


def machine() -> dict[str, Any]:
    """GPU, driver and versions, asked in a process of its own so that this one holds no GPU memory."""
    code = "import json; from trt_core.gpu import environment; print(json.dumps(environment()))"
    found = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1])
    from importlib.metadata import version

    versions = {k: found[k] for k in ("torch", "torch_tensorrt", "tensorrt", "triton", "cuda")}
    versions["diffusers"] = version("diffusers")
    return {"gpu": found["gpu"], "driver": found["driver"], "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", help="names, or starts of names; all by default")
    parser.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--folder", type=Path, help="keeps caches and references here, for another part of the same run"
    )
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one process")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="flux_benchmark_"))
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    path = args.results / file_name(about["gpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    if not (folder / "reference_adversarial.pt").exists():
        child({"references": True, "folder": str(folder)}, args.limit)
    for scenario in named(args.scenarios):
        lines = [{"run": args.run, **line, **about} for line in run_scenario(scenario, folder, args.limit)]
        ratios(lines, known)
        known += lines
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            sys.stdout.write(_summary(scenario, line) + "\n")
            sys.stdout.flush()


_SHOWN = (
    "step_ms", "ratio_to_eager", "first_call_seconds", "warm_first_call_seconds", "lora_switch_ms", "lora_refit_ms",
    "lora_first_ms", "lora_step_ms", "plan_bytes", "host_peak_bytes_above_weights", "gpu_peak_bytes", "error_ratio",
)  # fmt: skip


def _summary(scenario: Scenario, line: dict[str, Any]) -> str:
    values = [f"{name} {line[name]:.4g}" for name in _SHOWN if name in line]
    return f"{scenario.name} b{line['batch']}: " + ", ".join(values)


if __name__ == "__main__":
    main()
