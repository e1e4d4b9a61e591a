"""`python -m benchmarks.comfyui`: the node pack in a real ComfyUI server, beside ComfyUI's own way, in one run.

COMFYUI_PATH (default ~/ComfyUI) and COMFYUI_PYTHON (default ~/comfy-venv/bin/python) say which ComfyUI. Every case runs
the same sequence: no LoRA, A, B, B at another strength, none, with repeats; one JSON line per case.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.comfy.events import Events
from tests.comfy.process import CPU_FLAGS, ServerProcess, ServerStartError
from tests.comfy.server import NodeError, PromptError, Server
from tests.comfy.tensors import relative_error

from . import comfyui_graph as parts
from .comfyui_graph import Case, Files, GpuMemory, Workflow
from .lines import append, file_name

# A folder of its own: benchmarks.report makes the README's table from every file in the one above.
RESULTS = Path(__file__).parent / "results" / "comfyui"
MODES = {"dynamic": (), "legacy": ("--disable-dynamic-vram",), "lowvram": ("--lowvram",), "cpu": CPU_FLAGS}
SEQUENCE = {
    "first": None, "again": None, "A": ("a", 1.0), "A again": ("a", 1.0), "B": ("b", 1.0), "B at 0.5": ("b", 0.5),
    "none": None, "none again": None,
}  # fmt: skip
"""Label and LoRA of each run, in order."""
SWITCHES = {
    "addition": ("A", "A again"), "other_file": ("B", "A again"), "other_strength": ("B at 0.5", "A again"),
    "removal": ("none", "none again"),
}  # fmt: skip
"""A switch costs a run after it less a run with the same LoRA again."""
_LONG = 4
"""A step is the difference between runs of 1 and of 1 + `_LONG` x `--steps` steps, by the latter's steps more."""


@dataclass(frozen=True)
class Item:
    """One queue item. `seconds`: from the server's own start to its own success. `said`: the last text on our node."""

    seconds: float
    latent: Tensor
    said: str


class Limit(RuntimeError):
    """`--limit` seconds are over."""


class Bench:
    """Runs cases in one server. Stock's latents stay here, for those that come after it."""

    def __init__(self, server: Server, args: argparse.Namespace, files: Files, deadline: float) -> None:
        self.server, self.args, self.files, self.deadline = server, args, files, deadline
        self._stock: dict[str, Tensor] = {}

    def measure(self, case: Case, gpu: GpuMemory) -> dict[str, Any]:
        """The measured fields of a case's line; frees the server's memory before and after."""
        self.server.free()
        workflow, steps = Workflow(case, self.files, self.args.px), self.args.steps
        line: dict[str, Any] = {"gpu_start_bytes": gpu.used(), "engines_before": self._engines()}
        gpu.peak()
        with self.server.events() as events:
            items = {label: self._run(workflow, lora, steps, label, events) for label, lora in SEQUENCE.items()}
            line |= {"gpu_after_bytes": gpu.used(), "gpu_peak_bytes": gpu.peak()}
            short, long = (self._run(workflow, None, n, f"steps: {n}", events) for n in (1, 1 + _LONG * steps))
        line["step_ms"] = (long.seconds - short.seconds) * 1000 / (_LONG * steps)
        line |= _seconds(items) | self._latents(case, items)
        self.server.free()
        return line | {"gpu_freed_bytes": gpu.used()}

    def _run(self, workflow: Workflow, lora: tuple[str, float] | None, steps: int, label: str, events: Events) -> Item:
        graph, latent, node = workflow.graph(lora, steps)
        path = self.server.scratch / f"{uuid.uuid4().hex}.safetensors"
        graph.add("Test_SaveLatent", samples=latent, path=str(path))
        seconds = self._wait(self.server.queue(graph), events)
        texts = events.texts(node.node_id) if node else []
        item = Item(seconds, load_file(path)["samples"], texts[-1] if texts else "")
        _say(f"  {label}: {seconds:.3f} s" + (f" [{' | '.join(item.said.splitlines())}]" if item.said else ""))
        return item

    def _wait(self, prompt_id: str, events: Events) -> float:
        """Seconds that the server worked on it."""
        left = self.deadline - time.monotonic()
        try:
            self.server.wait(prompt_id, left)
        except TimeoutError as error:
            if time.monotonic() < self.deadline:
                raise
            raise Limit(f"Stopped: {self.args.limit:.0f} s are over.") from error
        events.wait_for(lambda e: e.kind == "execution_success" and e.data["prompt_id"] == prompt_id, 10)
        messages = dict(self.server.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"])
        return (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000

    def _latents(self, case: Case, items: dict[str, Item]) -> dict[str, Any]:
        """Whether repeats are equal to the bit, what a LoRA changes, and the largest relative L2 error to stock."""
        latents = {label: item.latent for label, item in items.items()}
        pairs = (("first", "again"), ("A", "A again"), ("none", "none again"), ("first", "none"))
        found: dict[str, Any] = {
            "repeats_equal": all(latents[one].equal(other) for one, other in ((a, latents[b]) for a, b in pairs)),
            "lora_effect": relative_error(latents["A"], latents["none"]),
        }
        if case.scenario == "comfyui":
            self._stock = latents
        elif self._stock:
            found["error_to_stock"] = max(relative_error(latents[label], self._stock[label]) for label in latents)
        if case.scenario == "ours":
            found["said"] = {label: items[label].said for label in ("first", "B", "none")}
        return found

    def _engines(self) -> int:
        """Files in the engine cache: with none, the first run was a cold one."""
        return sum(path.is_file() for path in (self.files.folder / "tensorrt").rglob("*"))


def _seconds(items: dict[str, Item]) -> dict[str, Any]:
    seconds = {label: item.seconds for label, item in items.items()}
    return {
        "first_run_seconds": seconds["first"],
        "switch_seconds": {name: round(seconds[a] - seconds[b], 4) for name, (a, b) in SWITCHES.items()},
        "runs_seconds": seconds,
    }


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    deadline = time.monotonic() + args.limit
    checkout, python = (Path(os.environ.get(name, default)).expanduser() for name, default in _COMFYUI)
    files = Files(args.models or parts.models_folder(args.size), args.size, args.naming, args.modulations)
    _write(files)
    (about, args.gpu_uuid), lines = parts.machine(python), []
    try:
        with tempfile.TemporaryDirectory(prefix="comfyui_") as base:
            process = ServerProcess(checkout, python, Path(base), flags=_flags(args, Path(base)))
            process.models = files.folder
            with _started(process, args.log):
                about["versions"]["comfyui"] = _comfyui_version(process)
                for line in _lines(process, args, files, deadline, about):
                    lines.append(line)
                    _append(args.results, line)
    except ServerStartError as error:
        _say(str(error))
    except KeyboardInterrupt:
        _say("Interrupted.")
    _say(_table(lines))
    return 0 if len(lines) == len(args.chosen) else 1


def _lines(
    process: ServerProcess, args: argparse.Namespace, files: Files, deadline: float, about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A line for each case that succeeds, as soon as it is done."""
    scratch = process.base / "results"
    scratch.mkdir()
    bench = Bench(Server(process.url, scratch), args, files, deadline)
    with GpuMemory(args.gpu_uuid) as gpu:
        for case in args.chosen:
            _say(f"{args.mode}: {case.name}")
            try:
                measured = bench.measure(case, gpu)
            except (NodeError, PromptError) as error:
                _say(f"FAILED: {error}")
                continue
            except (Limit, OSError) as error:
                _say(f"{error}" if process.running() else f"The server ended:\n{process.log_text()[-4000:]}")
                return
            yield _complete(case, args, measured, about)


def _flags(args: argparse.Namespace, base: Path) -> tuple[str, ...]:
    """The mode's, the user's, and an empty frontend, so that ComfyUI's frontend package is not needed."""
    frontend = base / "frontend"
    frontend.mkdir()
    (frontend / "index.html").touch()
    return (*MODES[args.mode], *shlex.split(args.flags), "--front-end-root", str(frontend))


def _complete(case: Case, args: argparse.Namespace, measured: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    line = {
        "run": args.run, "scenario": case.scenario, "mode": args.mode, "flags": args.flags or None, "size": args.size,
        "backend": case.backend, "base_weights": case.base_weights, "lora_node": case.lora_node,
        "lora_rank": parts.RANK, "lora_naming": args.naming, "lora_modulations": args.modulations,
        "batch": 1, "height_px": args.px, "width_px": args.px, "text_tokens": parts.TEXT_TOKENS,
        "steps": args.steps, **measured, **about,
    }  # fmt: skip
    return {name: value for name, value in line.items() if value is not None}


def _append(folder: Path, line: dict[str, Any]) -> None:
    gpu = "cpu" if line["gpu"] == "none" else line["gpu"]
    append(folder / f"comfyui-{file_name(gpu)}", line)


@contextmanager
def _started(process: ServerProcess, log: Path | None) -> Iterator[None]:
    """The server runs inside, and surely not after; its log is copied to `log`."""
    process.link_packs({"test_pack": parts.ROOT / "tests" / "comfy" / "test_pack", "trt-lora-flux": parts.ROOT})
    try:
        process.start()
        yield
    finally:
        process.stop()
        if log and process.log.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(process.log, log)


def _write(files: Files) -> None:
    started = time.perf_counter()
    writer = multiprocessing.get_context("spawn").Process(target=files.write, daemon=True)
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"The checkpoint could not be written to {files.folder}.")
    _say(f"Models in {files.folder}, kept for another run ({time.perf_counter() - started:.1f} s)")


def _comfyui_version(process: ServerProcess) -> str:
    return Server(process.url, process.base).get("/system_stats")["system"]["comfyui_version"]


def _table(lines: list[dict[str, Any]]) -> str:
    head = ("case", "ms/step", "first s", *(f"{name} s" for name in SWITCHES), "GPU peak GB", "error", "repeats")
    rows = [head, *(_row(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    case = Case(line["scenario"], line["lora_node"], line.get("backend"), line.get("base_weights"))
    peak, error = line.get("gpu_peak_bytes"), line.get("error_to_stock")
    return (
        case.name, f"{line['step_ms']:.1f}", f"{line['first_run_seconds']:.2f}",
        *(f"{line['switch_seconds'][name]:.3f}" for name in SWITCHES), f"{peak / 1e9:.1f}" if peak else "",
        "" if error is None else f"{error:.2e}", "equal" if line["repeats_equal"] else "differ",
    )  # fmt: skip


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


_COMFYUI = (("COMFYUI_PATH", "~/ComfyUI"), ("COMFYUI_PYTHON", "~/comfy-venv/bin/python"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(parts.SHAPES), default="full")
    parser.add_argument("--mode", choices=list(MODES), default="dynamic", help="which of the server's memory modes")
    parser.add_argument("--flags", default="", help="more flags for the server, in one string")
    parser.add_argument("--cases", nargs="+", choices=["stock", "ours", "refit"], default=["stock", "ours", "refit"])
    parser.add_argument("--backend", nargs="+", default=["auto"], help="as on TRT Compile Transformer")
    parser.add_argument("--base-weights", nargs="+", default=["gpu"], choices=["auto", "gpu", "host"])
    parser.add_argument("--px", type=int, help="side of the picture; 1024, at the small size 256")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--naming", choices=["kohya", "diffusers"], default="kohya", help="of the LoRA files")
    parser.add_argument("--modulations", action="store_true", help="the LoRAs change modulations, too")
    parser.add_argument("--models", type=Path, help="models folder; files and engines in it are used again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--log", type=Path, help="copies the server's log there")
    parser.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds; finished lines are kept")
    args = parser.parse_args()
    args.px = args.px or (1024 if args.size == "full" else 256)
    args.chosen = list(parts.cases(args.cases, args.backend, args.base_weights))
    return args


if __name__ == "__main__":
    sys.exit(main())
