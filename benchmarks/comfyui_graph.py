"""Files, workflows and memory samples for `benchmarks.comfyui`: what is run in the server, and on what."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.comfy.checkpoint import FluxShape, write_lora_diffusers, write_lora_kohya
from tests.comfy.graph import FluxGraph, Link
from tests.comfy.pack import compiled

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"full": FluxShape(hidden=3072, double_blocks=19, single_blocks=38), "small": FluxShape()}
TEXT_TOKENS = 256
RANK = 16
_LORAS = {"kohya": write_lora_kohya, "diffusers": write_lora_diffusers}
_NO_MODULATIONS = r"^(?!.*(mod\.lin|modulation\.lin|norm1(_context)?\.linear|norm\.linear))"
_BRANCH_ENDS = ("attn.proj.weight", "mlp.2.weight", "linear2.weight")
_WRITERS = 8
_ENOUGH_SHM_BYTES = 60 * 10**9
_NVML_SECONDS = 0.02


@dataclass(frozen=True)
class Files:
    """What the server's models folder holds: names as ComfyUI's loaders show them."""

    folder: Path
    size: str
    naming: str = "kohya"
    modulations: bool = False

    @property
    def unet(self) -> str:
        return f"flux_{self.size}.safetensors"

    def lora(self, name: str) -> str:
        layers = "all" if self.modulations else "no_modulations"
        return f"{name}_{self.size}_{self.naming}_{layers}.safetensors"

    def write(self) -> None:
        """Writes what is not there yet. In a process of its own: it would keep GPU memory."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no half a file stays
        shape, only = SHAPES[self.size], "" if self.modulations else _NO_MODULATIONS
        _once(self.folder / "diffusion_models" / self.unet, lambda path: write_random_flux(path, shape))
        for seed, name in enumerate("ab", start=1):
            _once(
                self.folder / "loras" / self.lora(name),
                lambda path, seed=seed: _LORAS[self.naming](path, shape, seed, rank=RANK, only=only),
            )


def _once(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_random_flux(path: Path, shape: FluxShape) -> None:
    """A bf16 checkpoint in Black Forest Labs' naming, made on the GPU where there is one, tensor by tensor: 24 GB at
    full size, of which a few hundred MB are in memory at a time."""
    header, places = _layout(shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with path.open("wb") as file, ThreadPoolExecutor(_WRITERS) as pool:
        file.write(header)
        file.flush()
        list(pool.map(lambda place: _write_tensor(file.fileno(), device, *place), places))


def _layout(shape: FluxShape) -> tuple[bytes, list[tuple[str, tuple[int, ...], int]]]:
    """safetensors' header, and name, size and position in the file of each tensor."""
    entries, begin = {}, 0
    for name, size in shape.weights().items():
        end = begin + 2 * math.prod(size)
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    places = [(n, tuple(e["shape"]), 8 + len(text) + e["data_offsets"][0]) for n, e in entries.items()]
    return len(text).to_bytes(8, "little") + text, places


def _write_tensor(file: int, device: torch.device, name: str, size: tuple[int, ...], position: int) -> None:
    data = memoryview(_random(name, size, device).cpu().view(torch.uint8).numpy()).cast("B")
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def _random(name: str, size: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Residual branches at a fifth, as in benchmarks.model: else 57 blocks amplify one rounding to half of the output,
    which would leave nothing to compare."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    if name.endswith(".scale"):
        return 1 + 0.1 * noise
    if len(size) == 1:
        return 0.05 * noise
    return noise * ((0.2 if "blocks" in name and name.endswith(_BRANCH_ENDS) else 1.0) * size[1] ** -0.5)


def models_folder(size: str) -> Path:
    """In shared memory where the full size and what else is needed fits; a folder made before is used again."""
    name, shm = f"trt_lora_flux_{size}", Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free >= _ENOUGH_SHM_BYTES
    return (shm if roomy or (shm / name).is_dir() else Path(tempfile.gettempdir())) / name


def machine(python: Path) -> tuple[dict[str, Any], str | None]:
    """GPU, driver and versions as the server's Python has them, and the GPU's UUID; a process of its own asks."""
    found = json.loads(subprocess.check_output([str(python), "-c", _ASK], text=True, cwd=ROOT).splitlines()[-1])
    versions = {name: found[name] for name in ("torch", "torch_tensorrt", "tensorrt", "triton", "cuda")}
    return {"gpu": found["gpu"], "driver": found["driver"], "versions": versions}, found["uuid"]


_ASK = """
import json, torch
from trt_core.gpu import environment
uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else None
print(json.dumps({**environment(), "uuid": uuid}))
"""


@dataclass(frozen=True)
class Case:
    """One way to run FLUX: "comfyui" itself, or "ours" with a LoRA by ComfyUI's loader or by TRT LoRA Refit."""

    scenario: str
    lora_node: str = "LoraLoaderModelOnly"
    backend: str | None = None
    base_weights: str | None = None

    @property
    def name(self) -> str:
        how = [self.backend or "", f"base {self.base_weights}"] if self.scenario == "ours" else []
        return ", ".join([self.scenario, *how, self.lora_node])


@dataclass(frozen=True)
class Workflow:
    """Loader, our node or not, LoRA or not, KSampler."""

    case: Case
    files: Files
    side_px: int

    def graph(self, lora: tuple[str, float] | None, steps: int) -> tuple[FluxGraph, Link, Link | None]:
        """The workflow, its latent, and our node."""
        graph, case = FluxGraph(), self.case
        model, node = graph.unet(self.files.unet), None
        if case.scenario == "ours":
            node = model = compiled(graph, model, backend=case.backend, base_weights=case.base_weights)
        model = self._with_lora(graph, model, lora)
        text, empty = graph.text(tokens=TEXT_TOKENS), graph.empty_latent(self.side_px, self.side_px)
        return graph, graph.sample(model, text, latent=empty, steps=steps), node

    def _with_lora(self, graph: FluxGraph, model: Link, lora: tuple[str, float] | None) -> Link:
        name, strength = (self.files.lora(lora[0]), lora[1]) if lora else ("none", 1.0)
        if self.case.lora_node == "TRT_LoraRefit":  # stays in the workflow: an artist changes its widgets
            return graph.add("TRT_LoraRefit", model=model, lora_1=name, strength_1=strength, on_1=True)
        return graph.lora(model, name, strength) if lora else model


def cases(kinds: list[str], backends: list[str], base_weights: list[str]) -> Iterator[Case]:
    """`kinds`: "stock", "ours" (LoRA by ComfyUI's loader), "refit" (by TRT LoRA Refit). Stock first, to compare."""
    if "stock" in kinds:
        yield Case("comfyui")
    for backend in backends:
        for base in base_weights:
            for kind, node in (("ours", "LoraLoaderModelOnly"), ("refit", "TRT_LoraRefit")):
                if kind in kinds:
                    yield Case("ours", node, backend, base)


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class GpuMemory:
    """All memory in use on the server's GPU, asked from NVML: the server's and its builders', and no context of ours.

    A context manager; `gpu_uuid` as `machine` found it, None without a GPU: then every number is None.
    """

    def __init__(self, gpu_uuid: str | None) -> None:
        self._device = _nvml_device(gpu_uuid) if gpu_uuid else None
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> GpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def used(self) -> int | None:
        if self._device is None:
            return None
        nvml, device = self._device
        memory = _NvmlMemory()
        failed = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        return None if failed else memory.used

    def peak(self) -> int | None:
        """The most since the last call of this method."""
        peak, self._peak = self._peak, 0
        return peak or None

    def _sample(self) -> None:
        while not self._stop.wait(_NVML_SECONDS):
            self._peak = max(self._peak, self.used() or 0)


def _nvml_device(gpu_uuid: str) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device = ctypes.c_void_p()
    # By UUID: NVML counts all GPUs, CUDA only those of CUDA_VISIBLE_DEVICES.
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(gpu_uuid.encode(), ctypes.byref(device)):
        return None
    return nvml, device
