"""Run once by ComfyUI-Manager after it has installed the pack: adds the Torch-TensorRT that fits torch and GPU.

torch itself is never installed, updated or replaced: its installed version is given to pip as a condition. Without
TensorRT the pack works too, through Inductor or eagerly, so nothing here is an error for the installation.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from trt_core import packages
from trt_core.errors import MissingDependency

WITHOUT = "The nodes work without TensorRT (Inductor, or eagerly)."


@dataclass(frozen=True, slots=True)
class Decision:
    """What to say, and what to install; `requirement` is empty where there is nothing to do."""

    text: str
    requirement: str = ""


def decide(torch_version: str | None, gpu_name: str | None, installed: Callable[[str], str | None]) -> Decision:
    """What this machine needs; `installed` gives the version of a distribution or None."""
    if torch_version is None:
        return Decision(f"torch is not installed in this Python: nothing done. {WITHOUT}")
    if gpu_name is None:
        return Decision(f"torch {torch_version} sees no NVIDIA GPU: TensorRT is not installed. {WITHOUT}")
    try:
        requirement = packages.torch_tensorrt_requirement(torch_version, gpu_name)
    except MissingDependency as error:
        return Decision(f"{error} {WITHOUT}")
    name, version = requirement.split("==")
    present = {other: installed(other) for other in (packages.STANDARD, packages.RTX) if installed(other)}
    if present == {name: version}:
        return Decision(f"{requirement} is installed already, as torch {torch_version} on {gpu_name} needs it.")
    if present:
        found = ", ".join(f"{other} {seen}" for other, seen in present.items())
        return Decision(
            f"{found} is installed and was left alone; torch {torch_version} on {gpu_name} would need {requirement}. "
            f"To change it: uninstall that first, then run: {packages.install_line(requirement)}. {WITHOUT}"
        )
    return Decision(f"Installing {requirement} for torch {torch_version} on {gpu_name}.", requirement)


def install(requirement: str, torch_version: str) -> str:
    """Installs with torch pinned to what is there; what happened, in a sentence."""
    command = [sys.executable, "-m", "pip", "install", requirement, f"torch=={torch_version}"]
    done = subprocess.run(command, check=False)
    if done.returncode == 0:
        return f"{requirement} is installed; torch {torch_version} was not touched."
    return (
        f"pip could not install {requirement} (see above); torch {torch_version} was not touched. {WITHOUT} "
        f"To try again: {packages.install_line(requirement)}"
    )


def gpu_name() -> str | None:
    """The current GPU's name, or None where torch sees none."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):  # OSError: a torch whose libraries are missing
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


_FASTER = {
    packages.CUDNN_FRONTEND_REQUIREMENT: "attention of FP8 models runs in FP8 with it",
    packages.FLASH3_REQUIREMENT: "attention is faster with it on this GPU",
}


def decide_attention(capability: tuple[int, int] | None) -> list[Decision]:
    """What attention kernels of this GPU are missing."""
    missing = packages.attention_requirements(capability) if capability else []
    return [Decision(f"Installing {each}: {_FASTER[each]}.", each) for each in missing]


def capability() -> tuple[int, int] | None:
    """The current GPU's compute capability, or None where torch sees none."""
    return importlib.import_module("torch").cuda.get_device_capability() if gpu_name() else None


def main() -> int:
    torch_version = packages.installed("torch")
    found = decide(torch_version, gpu_name() if torch_version else None, packages.installed)
    for decision in (found, *decide_attention(capability() if torch_version else None)):
        _say(decision.text)
        if decision.requirement and torch_version:
            _say(install(decision.requirement, torch_version))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"[TRT LoRA for FLUX] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
