"""Which Torch-TensorRT belongs to the installed torch and GPU, and the line that installs it; stdlib only.

`python -m trt_core.packages` prints that line for this machine.
"""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata

from .errors import MissingDependency

STANDARD = "torch-tensorrt"
RTX = "torch-tensorrt-rtx"
"""Both wheels import as `torch_tensorrt`, so an environment can hold only one of them."""
CUDNN_FRONTEND = "nvidia-cudnn-frontend"
"""NVIDIA's Python front end to the cuDNN that comes with torch. FP8 attention needs it."""
CUDNN_FRONTEND_REQUIREMENT = f"{CUDNN_FRONTEND}<1.23"
"""3 MB that need nothing else; newer ones ask for CUTLASS's compiler, which is not used here (they work, too)."""
FLASH3 = "fa3-fwd"
"""FlashAttention-3's forward, prebuilt (28 MB) for the stable ABI of torch 2.10 and newer."""
FLASH3_REQUIREMENT = f"{FLASH3}==0.0.3"
FLASH3_CAPABILITY = (9, 0)
FP8_ATTENTION_CAPABILITY = (9, 0)
"""The oldest GPUs on which cuDNN has attention in E4M3 (H100)."""


@dataclass(frozen=True, slots=True)
class Release:
    """One release of Torch-TensorRT and what its wheels are built against. `torch` is major.minor."""

    torch_tensorrt: str
    torch: str
    tensorrt: str
    tensorrt_rtx: str
    cuda: str


# From the wheels' METADATA and Torch-TensorRT's setup.py; each release pins one minor version of torch.
RELEASES = (
    Release("2.11.0", "2.11", "10.15.1", "1.3.0", "13.0"),
    Release("2.12.1", "2.12", "10.16.1", "1.4.0", "13"),
    Release("2.13.0", "2.13", "11.0", "1.5.0", "13.2"),
    Release("2.14.0", "2.14", "11.1", "1.6.1", "13"),
)


def installed(name: str) -> str | None:
    """The installed version of the distribution `name`, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_rtx(gpu_name: str) -> bool:
    """Whether TensorRT-RTX is made for this GPU: GeForce and RTX cards, not data-centre ones (H100, L40S)."""
    return re.search(r"\b(RTX|GeForce)", gpu_name, re.IGNORECASE) is not None


def torch_tensorrt_package(gpu_name: str) -> str:
    """The distribution that fits the GPU: `torch-tensorrt-rtx` or `torch-tensorrt`."""
    return RTX if is_rtx(gpu_name) else STANDARD


def torch_requirement() -> str:
    """The versions of torch that have a Torch-TensorRT, such as `torch>=2.11,<2.15`."""
    major, minor = RELEASES[-1].torch.split(".")
    return f"torch>={RELEASES[0].torch},<{major}.{int(minor) + 1}"


def torch_tensorrt_requirement(torch_version: str, gpu_name: str) -> str:
    """The pin that fits, such as `torch-tensorrt-rtx==2.11.0`; local suffixes like `+cu130` do not matter.

    Raises:
        MissingDependency: no Torch-TensorRT is released for this torch; the message lists those with one.
    """
    match = re.match(r"\d+\.\d+", torch_version)
    for release in RELEASES:
        if match and match.group() == release.torch:
            return f"{torch_tensorrt_package(gpu_name)}=={release.torch_tensorrt}"
    raise MissingDependency(
        f"There is no Torch-TensorRT for torch {torch_version}.",
        expected=f"It exists for torch {', '.join(release.torch for release in RELEASES)}.",
        fix="Use one of these versions of torch, or choose backend='inductor', which needs no TensorRT.",
    )


def install_line(*requirements: str, python: str | None = None) -> str:
    """The command that installs `requirements` for `python` (default: the running one), for any shell.

    It names the installed torch too, so that pip can never replace the torch that ComfyUI runs on.
    """
    torch_version = installed("torch")
    if torch_version and not any(re.match(r"torch\b(?!-)", requirement) for requirement in requirements):
        requirements = (*requirements, f"torch=={torch_version}")
    words = [python or sys.executable or "python", "-m", "pip", "install", *requirements]
    return " ".join(f'"{word}"' if re.search(r"[\s<>]", word) else word for word in words)


def _advice() -> str:
    """What to install on this machine, or why there is nothing to install."""
    torch_version = installed("torch")
    if torch_version is None:
        raise MissingDependency("torch is not installed here.", fix="Use the Python that ComfyUI runs on.")
    import torch  # the only part that needs it: asking the GPU for its name

    if not torch.cuda.is_available():
        return f"torch {torch_version} sees no NVIDIA GPU, so TensorRT is of no use here."
    gpu_name = torch.cuda.get_device_name()
    requirement = torch_tensorrt_requirement(torch_version, gpu_name)
    name, version = requirement.split("==")
    missing = [] if installed(name) == version else [requirement]
    missing += attention_requirements(torch.cuda.get_device_capability())
    if not missing:
        return f"{requirement} is installed, as torch {torch_version} on {gpu_name} needs it."
    return f"For torch {torch_version} on {gpu_name}:\n{install_line(*missing)}"


def attention_requirements(capability: tuple[int, int]) -> list[str]:
    """What is not installed of the attention kernels that a GPU of this compute capability can run."""
    missing = []
    if capability >= FP8_ATTENTION_CAPABILITY and installed(CUDNN_FRONTEND) is None:
        missing.append(CUDNN_FRONTEND_REQUIREMENT)
    if capability == FLASH3_CAPABILITY and has_flash3_wheel() and installed(FLASH3) is None:
        missing.append(FLASH3_REQUIREMENT)
    return missing


def has_flash3_wheel() -> bool:
    """Whether there is a wheel of FlashAttention-3 for this system."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def main() -> int:
    """Prints the advice; exit code 1 where there is no Torch-TensorRT for the installed torch."""
    try:
        sys.stdout.write(_advice() + "\n")
    except MissingDependency as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
