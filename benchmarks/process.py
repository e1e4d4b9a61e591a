"""One scenario in a process of its own: `python -m benchmarks.process JSON`. Prints lines of JSON."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import model as models
from .fake_quant import FakeAttention, fake_quantized
from .fp8_budget import seconds
from .fp8_calls import attention_is_fp8, call, exact
from .fp8_lines import TINY, device_of
from .lines import Line
from .memory import MemoryPeaks
from .pictures import Pictures, pipeline
from .progress import Progress
from .scenarios import Scenario
from .wide import widened

WEIGHTS_BYTES = 2 * 11_901_408_320
_LAST_WORDS_SECONDS = 5.0
"""Before it is stopped, a process says where it is."""
_BAKED = ("mttm", "torchao")
"""Their weights are in what was compiled, or are no plain tensors: they are measured on plain weights alone, because
new ones would cost minutes."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process: `folder` is the scenario's own, `references` is where all of them find fp32's outputs."""

    scenario: Scenario
    folder: Path
    references: Path
    device: torch.device
    progress: Progress
    warm: bool = False
    tiny: bool = False
    ends: float = float("inf")
    """When it will be stopped, as `time.time` counts."""

    def model(self) -> Any:
        return models.full_size_transformer(self.device, **(TINY if self.tiny else {}))

    def inputs(self, model: Any, batch: int) -> dict[str, torch.Tensor]:
        sizes = (self.scenario.height_px, self.scenario.width_px, self.scenario.text_tokens)
        return models.inputs(model, batch, *(size // 16 if self.tiny else size for size in sizes))

    @classmethod
    def read(cls, values: Line) -> Job:
        scenario, tiny = Scenario.from_dict(values["scenario"]), values.get("tiny", False)
        progress = Progress(scenario.name, values["started"])
        return cls(scenario, Path(values["folder"]), Path(values["references"]), device_of(tiny), progress,
                   values.get("warm", False), tiny, values["started"] + values["limit_seconds"])  # fmt: skip


def measure(job: Job) -> Iterator[Line]:
    """The measured fields of one line per batch; `warm` measures the first call only. What a batch has early comes
    early, as an `incomplete` line."""
    with MemoryPeaks(job.device) if job.device.type == "cuda" else nullcontext() as peaks:
        with job.progress.phase("model"):
            model = job.model()
            pipe = pipeline(model)
        with job.progress.phase("prepare"):
            transformer = _prepare(job, pipe)
        for batch in job.scenario.batches[:1] if job.warm else job.scenario.batches:
            for line in _batch(job, batch, model, pipe, transformer):
                yield line if job.warm else {**line, **_peaks(job.scenario, peaks)}


def _batch(job: Job, batch: int, model: Any, pipe: Any, transformer: Any) -> Iterator[Line]:
    arguments, is_first = job.inputs(model, batch), batch == job.scenario.batches[0]
    pictures = Pictures(pipe, transformer, arguments)

    def run() -> torch.Tensor:
        return call(transformer, arguments)

    with job.progress.phase(f"first call, batch {batch}"), known_when_stopped(job, batch):
        first_call = seconds(run, job.device)
    if job.warm:
        yield {"batch": batch, "warm_first_call_seconds": first_call}
        return
    line: Line = {"batch": batch, "step_ms": pictures.step_ms(job.device), "steps_per_picture": pictures.steps}
    job.progress.say(f"batch {batch}: {line['step_ms']:.1f} ms per step")
    if is_first:
        line |= {"first_call_seconds": first_call, **_plans(transformer)}
        yield {**line, "incomplete": True}
        line["error_ratio"] = _error_ratio(job, model, transformer)
    if job.scenario.lora and is_first:
        job.progress.say("LoRAs")
        line |= _lora_switch(job, transformer, run, pictures)
    yield line


@contextmanager
def known_when_stopped(job: Job, batch: int) -> Iterator[None]:
    """If the process is stopped inside, its last line says how long the first call had taken by then."""
    started = time.time()

    def last_words() -> None:
        write({"batch": batch, "incomplete": True, "first_call_seconds_at_least": time.time() - started})

    left = job.ends - _LAST_WORDS_SECONDS - started
    timer = threading.Timer(max(0.0, min(left, threading.TIMEOUT_MAX)), last_words)
    timer.daemon = True
    if not job.warm:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def write(line: Line) -> None:
    sys.stdout.write("LINE " + json.dumps({k: v for k, v in line.items() if v is not None}) + "\n")
    sys.stdout.flush()


def _peaks(scenario: Scenario, peaks: MemoryPeaks | None) -> Line:
    if peaks is None:
        return {}
    on_host = WEIGHTS_BYTES if scenario.base_weights == "host" else 0
    return {
        "gpu_peak_bytes": peaks.gpu_bytes, "host_peak_bytes_above_weights": peaks.host_bytes_without(on_host),
        "host_counts_pinned": peaks.counts_pinned, "host_peak_seconds": round(peaks.host_peak_seconds, 1),
        "host_peak_shares": [share._asdict() for share in peaks.host_shares],
    }  # fmt: skip


def _prepare(job: Job, pipe: Any) -> Any:
    """What is called: the model itself, compiled or with a compiled forward, or a module around it."""
    scenario, model = job.scenario, pipe.transformer
    if scenario.scenario == "eager":
        return model
    if scenario.scenario in ("compile_repeated_blocks", "torchao"):
        if scenario.scenario == "torchao":
            from .torchao_fp8 import quantize

            job.progress.say(f"torchao has quantized {quantize(model)} layers")
        model.compile_repeated_blocks(fullgraph=True)
        return model
    import trt_core

    if scenario.precision == "fp8":
        trt_core.quantize_fp8_(model)
    return trt_core.compile_transformer(
        pipe,
        backend=scenario.backend or "mttm",
        base_weights=scenario.base_weights or "auto",
        cache_folder=str(job.folder / "cache"),
    )


def _plans(transformer: Any) -> Line:
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


# -- errors ------------------------------------------------------------------------------------------------------------


def _error_ratio(job: Job, model: Any, transformer: Any) -> float | None:
    """The larger of plain and adversarial weights: error against fp32, in multiples of eager bf16's, or for FP8 of a
    simulation's that rounds and does nothing else. None without references, or at another first batch than theirs."""
    baked, ratios = job.scenario.scenario in _BAKED, []
    for kind in ("plain",) if baked else ("plain", "adversarial"):
        reference = job.references / f"reference_{kind}.pt"
        if job.scenario.batches[0] != 1 or not reference.exists():
            return None
        saved = torch.load(reference, weights_only=True)
        if not baked:
            refill(model, adversarial=kind == "adversarial")
        seen = call(transformer, job.inputs(model, 1))
        simulated = "simulated_attention_error" if attention_is_fp8(transformer) else "simulated_error"
        yardstick = saved[simulated if job.scenario.precision == "fp8" else "eager_error"]
        ratios.append(relative(seen, saved["fp32"].to(seen.device)) / yardstick)
        job.progress.say(f"{kind} weights: error {ratios[-1]:.3f} of the yardstick's")
    if not baked:
        refill(model, adversarial=False)
    return max(ratios)


def refill(model: Any, adversarial: bool) -> None:
    """New weights. An FP8 model reads them when it is bound again, which any change of its place brings about."""
    if hasattr(model, "trt_report"):
        model.to(model.dtype)
    models.fill(model, adversarial)


def relative(seen: torch.Tensor, reference: torch.Tensor) -> float:
    return float((seen.float() - reference).norm() / reference.norm())


def write_references(job: Job) -> None:
    """fp32 outputs of the same bf16 weights, and the errors of eager bf16 and of simulated FP8 against them, for both
    kinds of weights."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = job.model()
    wide, arguments = widened(model), job.inputs(model, 1)
    for kind in ("plain", "adversarial"):
        models.fill(model, adversarial=kind == "adversarial")
        fp32, eager = call(wide, exact(arguments)), call(model, arguments)
        with fake_quantized(model):
            simulated = call(model, arguments)
            with FakeAttention():
                with_attention = call(model, arguments)
        outputs = {"eager": eager, "simulated": simulated, "simulated_attention": with_attention}
        errors = {f"{name}_error": relative(output, fp32) for name, output in outputs.items()}
        path = job.references / f"reference_{kind}.pt"
        # Renamed when it is whole: another process may look for it meanwhile.
        torch.save({"fp32": fp32.cpu(), **errors}, path.with_suffix(f".{os.getpid()}"))
        path.with_suffix(f".{os.getpid()}").replace(path)
        job.progress.say(f"against fp32, {kind} weights: {errors}")


# -- LoRAs -------------------------------------------------------------------------------------------------------------


def _lora_switch(job: Job, model: Any, run: Callable[[], Any], pictures: Pictures) -> Line:
    """A to B by diffusers' own call: the next step's time above a plain step, and the refit's own time."""
    layers = models.add_loras(model, job.scenario.lora_rank)
    model.set_adapters("a")
    first = seconds(run, job.device)
    times, refits = [], []
    plain = min(seconds(run, job.device) for _ in range(3))
    for name in ("b", "a", "b", "a"):
        model.set_adapters(name)
        times.append(seconds(run, job.device) - plain)
        refits.append(model.trt_report().last_refit.milliseconds)
    after = pictures.step_ms(job.device)
    model.delete_adapters(["a", "b"])
    return {
        "lora_rank": job.scenario.lora_rank,
        "lora_layers": layers,
        "lora_switch_ms": sorted(times)[len(times) // 2] * 1000,
        "lora_refit_ms": sorted(refits)[len(refits) // 2],
        "lora_first_ms": (first - plain) * 1000,
        "lora_step_ms": after,
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stderr)
    # One line per converted layer, thousands for a whole model: they would be part of the stock module's seconds.
    logging.getLogger("torch_tensorrt").setLevel(logging.WARNING)
    values = json.loads(sys.argv[1])
    if values["limit_seconds"] > 2 * _LAST_WORDS_SECONDS:
        faulthandler.dump_traceback_later(values["limit_seconds"] - _LAST_WORDS_SECONDS)
    job = Job.read(values)
    job.progress.say("PyTorch imported")
    if values.get("write_references"):
        write_references(job)
        return
    for line in measure(job):
        write(line)


if __name__ == "__main__":
    main()
