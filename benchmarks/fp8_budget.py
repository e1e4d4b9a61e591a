"""`python -m benchmarks.fp8_budget`: FLUX.1-dev in FP8 under a limit of GPU memory, its bases in host memory.

The limit is PyTorch's own for this process, in decimal GB: it holds for all tensors, and not for what CUDA itself and
processes that build engines take. `gpu_peak_bytes_above_baseline` has those too, except this process's CUDA context.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trt_core.measure import median_milliseconds

from . import model as models
from .fp8_calls import call
from .fp8_lines import TINY, TINY_PX, TINY_TEXT_TOKENS, Line, device_of, parser, write
from .memory import MemoryPeaks
from .progress import Progress

PX, TEXT_TOKENS, RANK, STEPS = 1024, 512, 16, 10
SWITCHES = ("b", "a", "b", "a")


def measure(
    device: torch.device, gb: float, px: int, text_tokens: int, options: dict[str, Any], changes: dict[str, Any]
) -> Iterator[Line]:
    """One line, before it an `incomplete` one without LoRAs. The order is the point: once the limit stands, the model
    is never on the GPU in full size."""
    baseline_bytes = used_bytes(device)
    model = models.full_size_transformer(device, **changes).cpu()
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    limit(device, gb)
    line = {"kind": "budget", "budget_gb": gb, "weight_bytes": weight_bytes}
    with MemoryPeaks(device) if device.type == "cuda" else nullcontext() as peaks:
        phases: dict[str, dict[str, int]] = {}
        for measured in run(model, device, px, text_tokens, options, phases):
            yield {**line, **measured, **_memory(peaks, phases, baseline_bytes, weight_bytes)}


def _memory(
    peaks: MemoryPeaks | None, phases: dict[str, dict[str, int]], baseline_bytes: int, weight_bytes: int
) -> Line:
    if peaks is None:
        return {}
    return {
        **largest(phases),
        "gpu_peak_bytes": peaks.gpu_bytes,
        "gpu_peak_bytes_above_baseline": peaks.gpu_bytes - baseline_bytes,
        # Not `host_bytes_without`: at first these weights are in ordinary memory, which every system counts.
        "host_peak_bytes_above_weights": peaks.host_bytes - weight_bytes,
    }


def used_bytes(device: torch.device) -> int:
    """GPU memory in use by anybody, this process's CUDA context included."""
    if device.type != "cuda":
        return 0
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def limit(device: torch.device, gb: float) -> None:
    """From now on this process may hold `gb` of tensors on the GPU; it must hold none yet."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    if (held := torch.cuda.memory_allocated(device)) > 2**20:
        raise SystemExit(f"{held} bytes of the model are still on the GPU: the limit would be reached by them.")
    _, total = torch.cuda.mem_get_info(device)
    if gb * 1e9 > total:
        raise SystemExit(f"--gb {gb:g} is more than this GPU's {total / 1e9:.1f} GB.")
    torch.cuda.set_per_process_memory_fraction(gb * 1e9 / total, device)


def run(
    model: nn.Module, device: torch.device, px: int, text_tokens: int, options: dict[str, Any],
    phases: dict[str, dict[str, int]],
) -> Iterator[Line]:  # fmt: skip
    """Everything under the limit: the model, which lies in host memory, to the GPU, its first call, steps, LoRAs."""
    import trt_core

    trt_core.quantize_fp8_(model)
    ours: Any = trt_core.compile_transformer(model, base_weights="host", **options)
    with phase("to_gpu", device, phases):
        line = {"to_gpu_seconds": seconds(lambda: ours.to(device), device)}
    arguments = models.inputs(ours, 1, px, px, text_tokens)
    with phase("first_call", device, phases):
        line["first_call_seconds"] = seconds(lambda: call(ours, arguments), device)
    with phase("steps", device, phases):
        line["step_ms"] = median_milliseconds(lambda: call(ours, arguments), device, STEPS)
    line["parameter_bytes_on_device"] = sum(p.nbytes for p in ours.parameters() if p.device == device)
    report = ours.trt_report()
    line |= {"plan_bytes": report.plan_bytes, "segments": report.segments}
    yield {**line, "incomplete": True}
    with phase("loras", device, phases):
        line |= lora_switches(ours, arguments, device)
    yield line


@contextmanager
def phase(name: str, device: torch.device, phases: dict[str, dict[str, int]]) -> Iterator[None]:
    """Adds to `phases` the peaks of what is done inside, in bytes of this process's GPU tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Progress("fp8_budget").phase(name):
        yield
    if device.type != "cuda":
        return
    phases[name] = {
        "allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device),
    }  # fmt: skip


def largest(phases: dict[str, dict[str, int]]) -> Line:
    peaks = {kind: max(peak[kind] for peak in phases.values()) for kind in ("allocated", "reserved")}
    return {f"peak_{kind}_bytes": peak for kind, peak in peaks.items()} | {"phases": phases}


def lora_switches(ours: Any, arguments: dict[str, Tensor], device: torch.device) -> Line:
    """The time of a step with another LoRA above a plain step, A to B and back; the first one apart."""

    def switched(name: str) -> float:
        ours.set_adapters(name)
        return seconds(lambda: call(ours, arguments), device) - plain

    plain = min(seconds(lambda: call(ours, arguments), device) for _ in range(3))
    layers = models.add_loras(ours, RANK)
    line = {"lora_rank": RANK, "lora_layers": layers, "lora_first_ms": switched("a") * 1000}
    times, refits = [], []
    for name in SWITCHES:
        times.append(switched(name))
        refits.append(ours.trt_report().last_refit)
    return {
        **line,
        "lora_switch_ms": sorted(times)[len(times) // 2] * 1000,
        "lora_refit_ms": sorted(refit.milliseconds for refit in refits)[len(refits) // 2],
        "base_gpu_bytes": refits[-1].base_gpu_bytes,
        "base_host_bytes": refits[-1].base_host_bytes,
        "lora_step_ms": median_milliseconds(lambda: call(ours, arguments), device, STEPS),
    }


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gb", type=float, default=16.0, help="what tensors of this process may take, decimal GB")
    args = arguments.parse_args()
    device, options = device_of(args.tiny), {"backend": args.backend, "cache_folder": args.cache}
    px, text_tokens, changes = (TINY_PX, TINY_TEXT_TOKENS, TINY) if args.tiny else (PX, TEXT_TOKENS, {})
    lines = measure(device, args.gb, px, text_tokens, options, changes)
    write(args, ({**line, "height_px": px, "width_px": px, "text_tokens": text_tokens} for line in lines))


if __name__ == "__main__":
    main()
