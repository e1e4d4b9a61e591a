"""One scenario in a process of its own: `python -m benchmarks.process JSON`. Prints lines of JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trt_core.measure import median_milliseconds

from . import model as models
from .fake_quant import fake_quantized
from .memory import MemoryPeaks
from .scenarios import Scenario

WEIGHTS_BYTES = 2 * 11_901_408_320
_STEPS = 10


def measure(scenario: Scenario, folder: Path, warm: bool) -> Iterator[dict[str, Any]]:
    """The measured fields of one line per batch; `warm` measures the first call only."""
    device = torch.device("cuda", 0)
    torch.cuda.init()
    with MemoryPeaks(device) as peaks:
        model = models.full_size_transformer(device)
        run, transformer = _prepare(scenario, model, folder)
        for batch in scenario.batches[:1] if warm else scenario.batches:
            arguments = models.inputs(model, batch, scenario.height_px, scenario.width_px, scenario.text_tokens)
            first_call = _seconds(lambda a=arguments: run(a))
            if warm:
                yield {"batch": batch, "warm_first_call_seconds": first_call}
                return
            line: dict[str, Any] = {"batch": batch, "step_ms": _step_ms(lambda a=arguments: run(a))}
            if batch == scenario.batches[0]:
                line["first_call_seconds"] = first_call
                line |= _plans(transformer)
            line["error_ratio"] = _error_ratio(run, model, folder, batch, scenario)
            if scenario.lora and batch == scenario.batches[0]:
                line |= _lora_switch(scenario, transformer, lambda a=arguments: run(a))
            line["gpu_peak_bytes"] = peaks.gpu_bytes
            on_host = WEIGHTS_BYTES if scenario.base_weights == "host" else 0
            line["host_peak_bytes_above_weights"] = peaks.host_bytes_without(on_host)
            line["host_counts_pinned"] = peaks.counts_pinned
            yield line


def _prepare(scenario: Scenario, model: Any, folder: Path) -> tuple[Callable[[dict], torch.Tensor], Any]:
    transformer = model
    if scenario.scenario == "compile_repeated_blocks":
        model.compile_repeated_blocks(fullgraph=True)
    elif scenario.scenario in ("ours", "mttm"):
        import trt_core

        if scenario.precision == "fp8":
            trt_core.quantize_fp8_(model)
        transformer = trt_core.compile_transformer(
            model,
            backend=scenario.backend or "mttm",
            base_weights=scenario.base_weights or "auto",
            cache_folder=str(folder / "cache"),
        )

    def run(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return transformer(**arguments, return_dict=False)[0]

    return run, transformer


def _plans(transformer: Any) -> dict[str, Any]:
    if not hasattr(transformer, "trt_report"):
        return {}
    report = transformer.trt_report()
    return {
        "plan_bytes": report.plan_bytes,
        "segments": report.segments,
        "measurements": [
            {"what": m.what, "backend": m.backend, "ms": m.milliseconds, "ratio": m.error_ratio, "left_out": m.left_out}
            for m in report.measurements
        ],
    }


def _error_ratio(run: Callable, model: Any, folder: Path, batch: int, scenario: Scenario) -> float | None:
    """The larger of plain and adversarial weights: error against fp32, in multiples of eager bf16's, or for FP8 of a
    simulation's that rounds and does nothing else."""
    if batch != 1:
        return None
    ratios = []
    for kind in ("plain", "adversarial"):
        reference = folder / f"reference_{kind}.pt"
        if not reference.exists():
            return None
        saved = torch.load(reference, weights_only=True)
        if scenario.scenario == "mttm" and kind == "adversarial":
            continue  # its weights are baked in: new ones would cost a refit of minutes
        refill(model, adversarial=kind == "adversarial")
        seen = run(models.inputs(model, 1, scenario.height_px, scenario.width_px, scenario.text_tokens))
        yardstick = saved["simulated_error" if scenario.precision == "fp8" else "eager_error"]
        ratios.append(relative(seen, saved["fp32"].to(seen.device)) / yardstick)
    refill(model, adversarial=False)
    return max(ratios)


def refill(model: Any, adversarial: bool) -> None:
    """New weights. An FP8 model reads them when it is bound again, which any change of its place brings about."""
    if hasattr(model, "trt_report"):
        model.to(model.dtype)
    models.fill(model, adversarial)


def relative(seen: torch.Tensor, reference: torch.Tensor) -> float:
    return float((seen.float() - reference).norm() / reference.norm())


def write_references(folder: Path) -> None:
    """fp32 outputs of the same bf16 weights, and the errors of eager bf16 and of simulated FP8 against them, for both
    kinds of weights."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = models.full_size_transformer(torch.device("cuda", 0))
    for kind in ("plain", "adversarial"):
        models.fill(model.bfloat16(), adversarial=kind == "adversarial")
        with torch.no_grad():
            arguments = models.inputs(model, 1, 1024, 1024, 512)
            eager = model(**arguments, return_dict=False)[0]
            with fake_quantized(model):
                simulated = model(**arguments, return_dict=False)[0]
            model.float()
            fp32 = model(**models.inputs(model, 1, 1024, 1024, 512), return_dict=False)[0]
        errors = {"eager_error": relative(eager, fp32), "simulated_error": relative(simulated, fp32)}
        torch.save({"fp32": fp32.cpu(), **errors}, folder / f"reference_{kind}.pt")
        sys.stderr.write(f"against fp32, {kind} weights: {errors}\n")


def _lora_switch(scenario: Scenario, model: Any, run: Callable[[], Any]) -> dict[str, Any]:
    """A to B by diffusers' own call: the next step's time above a plain step, and the refit's own time."""
    layers = models.add_loras(model, scenario.lora_rank)
    model.set_adapters("a")
    first = _seconds(run)
    times, refits = [], []
    plain = min(_seconds(run) for _ in range(3))
    for name in ("b", "a", "b", "a"):
        model.set_adapters(name)
        times.append(_seconds(run) - plain)
        refits.append(model.trt_report().last_refit.milliseconds)
    after = _step_ms(run)
    model.delete_adapters(["a", "b"])
    return {
        "lora_rank": scenario.lora_rank,
        "lora_layers": layers,
        "lora_switch_ms": sorted(times)[len(times) // 2] * 1000,
        "lora_refit_ms": sorted(refits)[len(refits) // 2],
        "lora_first_ms": (first - plain) * 1000,
        "lora_step_ms": after,
    }


def _step_ms(run: Callable[[], Any]) -> float:
    return median_milliseconds(run, torch.device("cuda", 0), repeats=_STEPS)


def _seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stderr)
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    if job.get("references"):
        write_references(folder)
        return
    for line in measure(Scenario.from_dict(job["scenario"]), folder, job["warm"]):
        sys.stdout.write("LINE " + json.dumps({k: v for k, v in line.items() if v is not None}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
