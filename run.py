"""`python run.py demo` and `python run.py test`: make .venv, install what this machine can use, and run.

Standard library only. A second run finds the stamp in .venv and starts at once; a run that was stopped is
continued by the next one.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STATE = VENV / "run-state.json"
PIP_LOG = VENV / "pip.log"
OLDEST_PYTHON = (3, 10)
CPU_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
WINDOWS_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
MOST_WORKERS = 4
NEEDED_GB = {"cpu": 3, "gpu": 18}
DIFFUSERS = ("diffusers>=0.35,<1", "transformers>=4.50", "peft>=0.17", "accelerate>=1.0", "safetensors>=0.4.3")
TESTS = ("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.17,<0.18", "nvidia-modelopt>=0.47,<0.48")
TRITON = "triton==3.6.0"
"""What torch 2.11 brings on a GPU; without one, tests compile our kernels with it for GPUs that are not there."""
PACKAGES = (*DIFFUSERS, "sentencepiece", "protobuf", "pillow", *TESTS)
USAGE = "usage: python run.py demo [--help | options], python run.py test [options of pytest]"
NOT_OFFERED = "pip's sources lack a package for this Python and system. Python 3.10 to 3.13 are the safe choice."
NO_NETWORK = "pip could not reach its package index. Check the network or proxy and run the same command again."
FAILURES = {
    r"No space left|Errno 28": "The disk is full. Free some space and run the same command again.",
    r"CERTIFICATE_VERIFY_FAILED": "The TLS certificate was refused. Behind a proxy set PIP_CERT to its file.",
    r"name resolution|getaddrinfo|ConnectionError|ProxyError|unreachable|timed out": NO_NETWORK,
    r"ensurepip|No module named venv": "Python has no venv module. On Debian: sudo apt install python3-venv",
    r"Permission denied|WinError 5\b": "A file could not be written. Close what uses .venv and run again.",
    r"No matching distribution|Could not find a version": NOT_OFFERED,
    r"no such option": "pip is too old. Use a newer Python.",
}


class SetupError(Exception):
    """Ends the run with a message for the user."""


def why_not_python(version: tuple[int, ...]) -> str | None:
    """Why this Python cannot be used, or None."""
    if version[:2] >= OLDEST_PYTHON:
        return None
    return f"Python {version[0]}.{version[1]} is too old: start run.py with Python 3.10 or newer."


def parse_gpus(listing: str) -> list[str]:
    """GPU names out of `nvidia-smi -L`, such as `GPU 0: NVIDIA H200 (UUID: ...)`."""
    return re.findall(r"^GPU \d+: (.+?) \(UUID", listing, re.MULTILINE)


def torch_arguments(kind: str, system: str, cpu_index_reachable: bool) -> list[str]:
    """What pip is asked for: the CPU build without a GPU, else a torch that Torch-TensorRT exists for."""
    from trt_core.packages import torch_requirement

    if kind == "cpu":
        return [CPU_TORCH, "--index-url", CPU_INDEX] if cpu_index_reachable else [CPU_TORCH]
    # The torch of PyPI for Windows is the CPU build.
    return [torch_requirement(), *(["--index-url", WINDOWS_CUDA_INDEX] if system == "Windows" else [])]


def cuda_packages(report: dict) -> list[str]:
    """The CUDA packages that torch in the report of `pip install --dry-run` needs; a CPU build needs none."""
    needs = (need for item in report["install"] for need in item["metadata"].get("requires_dist", ()))
    return sorted(re.split(r"[^\w-]", need)[0] for need in needs if re.match(r"nvidia-|cuda-|triton", need))


def pytest_arguments(arguments: list[str], gpu: bool, root: Path = ROOT) -> list[str]:
    """The user's arguments, and all suites that fit this machine unless the user named files.

    Without a GPU, files of tests run side by side: 2 min instead of 3 on two cores. Tests on one GPU would disturb each
    other.
    """
    named = (argument.split("::")[0] for argument in arguments if not argument.startswith("-"))
    if any((root / path).exists() for path in named):
        return arguments
    suites = ["tests/unit", *(["tests/gpu"] if gpu else []), "tests/comfy"]
    beside = [] if gpu else ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]
    return [*(suite for suite in suites if (root / suite).is_dir()), *beside, *arguments]


def explain(output: str) -> str:
    """What went wrong and what to do, from the output of pip or venv."""
    for pattern, advice in FAILURES.items():
        if re.search(pattern, output, re.IGNORECASE):
            return advice
    return f"All output is in {PIP_LOG}; after mending the cause run the same command again."


def venv_python(folder: Path, system: str) -> Path:
    return folder / ("Scripts/python.exe" if system == "Windows" else "bin/python")


def stamp(hardware: str) -> str:
    """A hash of all that decides what is installed."""
    from trt_core.packages import RELEASES

    facts = [sys.version, platform.machine(), hardware, str(ROOT), *PACKAGES, CPU_TORCH, repr(RELEASES)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def say(text: str) -> None:
    print(text, flush=True)


def read_state() -> dict:
    try:
        return json.loads(STATE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_state(**facts: object) -> None:
    partial = STATE.with_suffix(".part")
    partial.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(partial, STATE)


def hardware_hint() -> str:
    """Changes when a GPU or its driver comes or goes; unlike asking nvidia-smi it costs nothing."""
    devices = Path("/proc/driver/nvidia/gpus")
    found = sorted(device.name for device in devices.iterdir()) if devices.is_dir() else []
    return f"{shutil.which('nvidia-smi')} {found}"


def gpu_names() -> list[str]:
    """The NVIDIA GPUs that the driver can use; empty where there is no driver or it does not answer."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False


def checked(command: list[str], what: str) -> str:
    """The output of a command, logged; shows pip's downloads; raises `SetupError` when the command fails."""
    seen = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with PIP_LOG.open("a", encoding="utf-8") as log, subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:
            log.write(line)
            seen.append(line)
            if re.match(r"\s*(Downloading .*[MG]B\)|Installing collected)", line):
                say("      " + line.strip()[:100])
    output = "".join(seen)
    if process.returncode:
        raise SetupError(f"{''.join(seen[-8:]).rstrip()}\n\n{what} failed. {explain(output)}")
    return output


def remove_torn(packages: Path) -> None:
    """Forgets packages whose installation was interrupted, so that pip installs them again.

    pip writes INSTALLER after it has copied a package's files.
    """
    for info in packages.glob("*.dist-info"):
        if not (info / "INSTALLER").is_file():
            shutil.rmtree(info)


def make_venv(kind: str, gpu: str) -> Path:
    """The Python of .venv, which is made anew if it belongs to another Python or to other hardware."""
    python = venv_python(VENV, platform.system())
    wanted = {"kind": kind, "python": sys.version}
    state = read_state()
    if (VENV / "pyvenv.cfg").exists() and not state:
        raise SetupError(f"{VENV} was not made by run.py. Rename or delete it and run again.")
    if state and {key: state.get(key) for key in wanted} != wanted:
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    write_state(**wanted, gpu=gpu)
    if not (python.exists() and (VENV / "pip-ready").exists()):
        checked([sys.executable, "-m", "venv", str(VENV)], "Making .venv")
        (VENV / "pip-ready").touch()
    for packages in VENV.glob("[Ll]ib/**/site-packages"):
        remove_torn(packages)
    return python


def refuse_cuda(pip: list[str]) -> None:
    """Raises `SetupError` if pip's sources would bring gigabytes of CUDA packages."""
    report = VENV / "report.json"
    checked([*pip, "--dry-run", "--no-deps", "--report", str(report), CPU_TORCH], "Looking for torch")
    unwanted = cuda_packages(json.loads(report.read_text(encoding="utf-8")))
    if unwanted:
        raise SetupError(
            f"{CPU_INDEX} cannot be reached, and the torch of pip's sources needs {len(unwanted)} CUDA packages, which"
            " are of no use without an NVIDIA GPU. Make that address reachable and run again."
        )


def install_torch(pip: list[str], python: Path, kind: str) -> str:
    """Installs torch and returns its version."""
    index = kind == "cpu" and reachable(CPU_INDEX + "/torch/")
    if kind == "cpu" and not index and platform.system() == "Linux":
        refuse_cuda(pip)
    checked([*pip, *torch_arguments(kind, platform.system(), index)], "Installing torch")
    ask = [str(python), "-c", "import torch; print(torch.__version__)"]
    return checked(ask, "Importing torch").split()[-1]


def install_tensorrt(pip: list[str], torch_version: str, gpu: str) -> None:
    """Torch-TensorRT where one exists for this torch and Python; without it Inductor and eager remain."""
    from trt_core.errors import MissingDependency
    from trt_core.packages import torch_tensorrt_requirement

    try:
        checked([*pip, torch_tensorrt_requirement(torch_version, gpu)], "Installing Torch-TensorRT")
    except MissingDependency as error:
        say(f"      No TensorRT: {error}")
    except SetupError as error:
        if NOT_OFFERED not in str(error):
            raise
        say(f"      No TensorRT: {error}")


def install(python: Path, kind: str, gpu: str) -> None:
    from trt_core.packages import CUDNN_FRONTEND_REQUIREMENT, FLASH3_REQUIREMENT, has_flash3_wheel

    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    say(f"[1/3] torch ({'CPU build' if kind == 'cpu' else 'CUDA build'})")
    torch_version = install_torch(pip, python, kind)
    constraints = VENV / "constraints.txt"
    constraints.write_text(f"torch=={torch_version}\n", encoding="utf-8")
    pip += ["--constraint", str(constraints)]
    say("[2/3] diffusers, transformers, peft, pytest and others")
    checked([*pip, *PACKAGES], "Installing the packages")
    say(f"[3/3] Torch-TensorRT{' for ' + gpu if gpu else ': not without an NVIDIA GPU'}")
    if kind == "gpu":
        install_tensorrt(pip, torch_version, gpu)
        checked([*pip, CUDNN_FRONTEND_REQUIREMENT], "Installing cuDNN's front end")
        if has_flash3_wheel():  # 28 MB; what is not a Hopper GPU never loads it
            checked([*pip, FLASH3_REQUIREMENT], "Installing FlashAttention-3")
    test = "import torch, diffusers, transformers, peft; print('cuda', torch.cuda.is_available())"
    if "cuda True" not in checked([str(python), "-c", test], "Importing what was installed") and gpu:
        say(f"      torch {torch_version} cannot use {gpu}: update its driver. Until then the CPU is used.")


def prepare() -> tuple[Path, str]:
    """The Python of a complete .venv and the GPU's name, empty without one; installs on the first run."""
    key, state, python = stamp(hardware_hint()), read_state(), venv_python(VENV, platform.system())
    if state.get("stamp") == key and python.exists():
        return python, state["gpu"]
    gpu = next(iter(gpu_names()), "")
    kind = "gpu" if gpu else "cpu"
    if not python.exists() and shutil.disk_usage(ROOT).free < NEEDED_GB[kind] * 1e9:
        raise SetupError(f"About {NEEDED_GB[kind]} GB are needed in {ROOT}. Free some space and run again.")
    where = f"for {gpu}, about 10" if gpu else "without GPU (nvidia-smi finds none), about 3"
    say(f"Installing into {VENV} {where} minutes. Later runs start at once.")
    start = time.monotonic()
    install(make_venv(kind, gpu), kind, gpu)
    write_state(kind=kind, python=sys.version, gpu=gpu, stamp=key)
    say(f"Ready after {time.monotonic() - start:.0f} s.\n")
    return python, gpu


def add_triton(python: Path, gpu: str) -> None:
    """Installs Triton for the tests where torch brought none; where that fails, the tests that need it are skipped."""
    there = any(VENV.glob("lib/python*/site-packages/triton-*.dist-info"))
    if gpu or there or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return
    say("Adding Triton (190 MB), which compiles our kernels in the tests")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
    try:
        checked([*pip, TRITON], "Installing Triton")
    except SetupError as error:
        say(f"      No Triton: {error}")


def command_line(arguments: list[str]) -> list[str]:
    """The command that does what was asked for, after installing what it needs."""
    if not arguments or arguments[0] not in ("demo", "test"):
        raise SetupError(USAGE)
    python, gpu = prepare()
    if arguments[0] == "test":
        add_triton(python, gpu)
        os.chdir(ROOT)
        return [str(python), "-m", "pytest", *pytest_arguments(arguments[1:], bool(gpu))]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return [str(python), "-m", "demo", *arguments[1:]]


def main(arguments: list[str]) -> int:
    reason = why_not_python(sys.version_info)
    try:
        if reason:
            raise SetupError(reason)
        line = command_line(arguments)
        if platform.system() == "Windows":
            return subprocess.call(line)
        os.execv(line[0], line)  # the child's exit code and signals become this process's own
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2 if str(error) == USAGE else 1
    except OSError as error:
        print(f"{error}. {explain(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command continues where this one ended.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
