"""Which GPU this is, what it can run, and the versions that compiled plans belong to.

Importing this file imports neither torch nor TensorRT; packages are identified by their metadata alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from .errors import MissingDependency
from .packages import install_line, torch_tensorrt_requirement

NONE = "none"
UNKNOWN = "unknown"
_NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_NVML_VERSION_BYTES = 80
"""NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE of NVIDIA's nvml.h."""


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """One CUDA device. `sm` is the compute capability, `driver` its version as major.minor."""

    name: str
    sm: tuple[int, int]
    vram_bytes: int
    driver: str


def current_gpu() -> GpuInfo | None:
    """PyTorch's current CUDA device; None without one. Imports torch and asks CUDA."""
    return None if gpu_count() == 0 else _gpu(_torch_cuda().current_device())


def gpu_count() -> int:
    """How many CUDA devices PyTorch sees; 0 without torch or CUDA."""
    try:
        cuda = _torch_cuda()
    except ImportError:
        return 0
    return cuda.device_count() if cuda.is_available() else 0


def _torch_cuda() -> ModuleType:
    # Costs a second and hundreds of MB, so only when a GPU is asked for.
    return importlib.import_module("torch").cuda  # type: ignore[no-any-return]


@functools.cache
def _gpu(index: int) -> GpuInfo:
    seen = _torch_cuda().get_device_properties(index)
    return GpuInfo(seen.name, (seen.major, seen.minor), seen.total_memory, driver_version())


def driver_version() -> str:
    """The NVIDIA driver as "580.82", asked from NVML as torch.cuda does; "unknown" without NVML."""
    try:
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() != 0:
            return UNKNOWN
        text = ctypes.create_string_buffer(_NVML_VERSION_BYTES)
        failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(_NVML_VERSION_BYTES))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return UNKNOWN
    return UNKNOWN if failed else major_minor(text.value.decode("ascii", "replace"))


def major_minor(version: str) -> str:
    """The first two numbers of a version: "580.82.07" gives "580.82"; "unknown" when there are none."""
    found = re.match(r"\d+(\.\d+)?", version)
    return found.group() if found else UNKNOWN


# -- what a GPU cannot do: a reason, or None


def why_not_fp8(gpu: GpuInfo | None) -> str | None:
    """Why FP8 matrix products cannot run on `gpu`, or None when they can."""
    return _below(gpu, (8, 9), "FP8 needs 8.9 (RTX 40 series, L40, H100) or newer")


def why_not_nvfp4(gpu: GpuInfo | None) -> str | None:
    """Why NVFP4 matrix products cannot run on `gpu`, or None when they can."""
    return _below(gpu, (10, 0), "NVFP4 needs 10.0 (B200, RTX 50 series) or newer")


def why_not_tensorrt(gpu: GpuInfo | None) -> str | None:
    """Why TensorRT cannot be used here: the GPU, or missing or unfit packages; None if it can."""
    reason = _below(gpu, (7, 5), "TensorRT needs 7.5 (RTX 20 series, T4) or newer")
    if gpu is None or reason:
        return reason
    return _why_not_packages(installed_packages(), gpu.name)


def _why_not_packages(found: Mapping[str, str], gpu_name: str) -> str | None:
    try:
        requirement = torch_tensorrt_requirement(found["torch"], gpu_name)
    except MissingDependency as error:
        return str(error)
    bridge, flavour = found["torch_tensorrt"], found["tensorrt_flavour"]
    if bridge == NONE:
        return f"Torch-TensorRT is not installed. Run: {install_line(requirement)}"
    if major_minor(bridge.split()[-1]) != major_minor(found["torch"]):
        return f"{bridge} does not fit torch {found['torch']}. Run: {install_line(requirement)}"
    if found["tensorrt"] == NONE:
        return f"{bridge} is installed without {flavour}. Run: {install_line(flavour)}"
    return None


def _below(gpu: GpuInfo | None, sm: tuple[int, int], needs: str) -> str | None:
    if gpu is None:
        return "PyTorch sees no NVIDIA GPU on this machine"
    if gpu.sm < sm:
        return f"{gpu.name} has compute capability {gpu.sm[0]}.{gpu.sm[1]}; {needs}"
    return None


# -- what compiled plans belong to


def environment(gpu: GpuInfo | None = None) -> dict[str, str]:
    """What a compiled plan depends on besides its options: machine, GPU (the current one), packages.

    Machines with equal environments can exchange plans. "none" stands for what is missing.
    """
    gpu = gpu or current_gpu()
    return {
        "os": platform.system().lower(),
        "arch": platform.machine().lower(),
        "gpu": gpu.name if gpu else NONE,
        "sm": f"{gpu.sm[0]}.{gpu.sm[1]}" if gpu else NONE,
        "driver": gpu.driver if gpu else NONE,
        "cuda": _cuda_of_torch() if gpu else NONE,
        **installed_packages(),
    }


def environments() -> list[dict[str, str]]:
    """One environment for each GPU of this machine, or the one without a GPU."""
    return [environment(_gpu(index)) for index in range(gpu_count())] or [environment()]


def gpu_slug(seen: Mapping[str, str]) -> str:
    """A folder name for the GPU of an environment, such as "nvidia-h200-sm90"; "no-gpu" without one."""
    if seen["gpu"] == NONE:
        return "no-gpu"
    name = re.sub(r"[^a-z0-9]+", "-", seen["gpu"].lower()).strip("-") or "gpu"
    return f"{name}-sm{seen['sm'].replace('.', '')}"


def _cuda_of_torch() -> str:
    # A wheel's metadata need not name its CUDA, and the kernels in plans of two CUDA releases differ.
    return importlib.import_module("torch").version.cuda or NONE


def installed_packages() -> dict[str, str]:
    """Distributions and versions that plans depend on, from metadata; follows changes of sys.path."""
    return dict(_packages(tuple(sys.path)))


@functools.cache
def _packages(_search_path: tuple[str, ...]) -> dict[str, str]:
    providers = _providers()
    bridges = _distributions(providers, "torch_tensorrt")
    flavour = _flavour(bridges)
    return {
        "torch": _versions(_distributions(providers, "torch")),
        "torch_tensorrt": _named(bridges),
        "tensorrt_flavour": flavour,
        "tensorrt": _tensorrt(providers, flavour),
        "triton": _versions(_distributions(providers, "triton")),
    }


def _providers() -> dict[str, list[str]]:
    """Top-level package -> names of the distributions that hold it, among those that may matter here.

    `importlib.metadata.packages_distributions` answers for every distribution and looks for each of its files on the
    disk: 1.0 of the 10 s of a sampled warm first call, three quarters of it for files.
    """
    found: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        name = _distribution_name(distribution)
        if any(word in name.lower() for word in ("torch", "tensorrt", "triton")):
            for package in _top_level(distribution):
                found.setdefault(package, []).append(name)
    return found


def _distribution_name(distribution: importlib.metadata.Distribution) -> str:
    # Parsing all of the metadata, as `.name` does, takes as long as all the rest of the search.
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    named = re.search(r"^Name: *(\S+)", text, re.MULTILINE)
    return named.group(1) if named else ""


def _top_level(distribution: importlib.metadata.Distribution) -> set[str]:
    """Its packages as it declares them, else from the list of its files (which need not all be there)."""
    if declared := distribution.read_text("top_level.txt"):
        return set(declared.split())
    if recorded := distribution.read_text("RECORD"):
        return {line.partition("/")[0] for line in recorded.splitlines() if "/" in line}
    return {file.parts[0] for file in distribution.files or () if len(file.parts) > 1}


def _flavour(bridges: Mapping[str, str]) -> str:
    """Which TensorRT `torch_tensorrt` will import: it decides by the name of the distribution it came in."""
    if not bridges:
        return NONE
    return "tensorrt_rtx" if "torch-tensorrt-rtx" in bridges else "tensorrt"


def _tensorrt(providers: Mapping[str, list[str]], flavour: str) -> str:
    """Distribution and exact version of TensorRT; the bindings name the CUDA release they were built for."""
    if flavour == NONE:
        return NONE
    found = _distributions(providers, f"{flavour}_bindings") or _distributions(providers, flavour)
    if not found and importlib.util.find_spec(flavour) is not None:
        return UNKNOWN
    return _named(found)


def _distributions(providers: Mapping[str, list[str]], package: str) -> dict[str, str]:
    """Normalised distribution name -> version, for all distributions that hold the top-level `package`."""
    names = sorted({name for name in providers.get(package, ()) if name})
    return {name.lower().replace("_", "-"): importlib.metadata.version(name) for name in names}


def _named(distributions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in distributions.items()) or NONE


def _versions(distributions: Mapping[str, str]) -> str:
    return ", ".join(dict.fromkeys(distributions.values())) or NONE
