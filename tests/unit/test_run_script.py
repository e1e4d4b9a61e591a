"""run.py: what it decides, and what it says when it cannot go on. Nothing is downloaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parents[2]
posix_only = pytest.mark.skipif(os.name == "nt", reason="makes symbolic links and replaces the process")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What run.py needs of a clone, in a folder of its own."""
    shutil.copy(ROOT / "run.py", tmp_path)
    (tmp_path / "trt_core").mkdir()
    for name in ("__init__.py", "errors.py", "packages.py"):
        shutil.copy(ROOT / "trt_core" / name, tmp_path / "trt_core")
    return tmp_path


def start(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs run.py there without a network: all proxies point at a closed port."""
    closed = "http://127.0.0.1:9"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.upper().startswith(("PIP_", "NO_PROXY"))},
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), closed),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "1",
    }
    line = [sys.executable, "run.py", *arguments]
    return subprocess.run(line, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 13, 1), (4, 0, 0)])
def test_newer_pythons_are_welcome(version: tuple[int, ...]) -> None:
    assert run.why_not_python(version) is None


@pytest.mark.parametrize("version", [(3, 9, 18), (2, 7, 18)])
def test_older_pythons_are_named(version: tuple[int, ...]) -> None:
    reason = run.why_not_python(version)
    assert reason
    assert f"{version[0]}.{version[1]}" in reason
    assert "3.10" in reason


def test_gpus_are_read_from_nvidia_smi() -> None:
    listing = (
        "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1f0e)\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2a7b)\n"
        "  MIG 1g.10gb     Device  0: (UUID: MIG-3c)\n"
    )
    assert run.parse_gpus(listing) == ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"]
    assert run.parse_gpus("No devices were found\n") == []


def test_cpu_build_of_torch_without_a_gpu() -> None:
    assert run.torch_arguments("cpu", "Linux", True) == ["torch==2.13.0", "--index-url", run.CPU_INDEX]
    assert run.torch_arguments("cpu", "Linux", False) == ["torch==2.13.0"]


def test_torch_that_torch_tensorrt_exists_for_with_a_gpu() -> None:
    assert run.torch_arguments("gpu", "Linux", False) == ["torch>=2.11,<2.15"]
    windows = run.torch_arguments("gpu", "Windows", False)
    assert windows == ["torch>=2.11,<2.15", "--index-url", run.WINDOWS_CUDA_INDEX]


def test_cuda_packages_of_a_dry_run_are_found() -> None:
    def report(*needs: str) -> dict:
        return {"install": [{"metadata": {"name": "torch", "requires_dist": list(needs)}}]}

    assert run.cuda_packages(report("filelock", "sympy>=1.13.3")) == []
    assert run.cuda_packages({"install": [{"metadata": {"name": "torch"}}]}) == []
    linux = '; platform_system == "Linux"'
    cuda = run.cuda_packages(
        report("jinja2", "nvidia-cudnn-cu13==9.20" + linux, "cuda-toolkit[cublas]==13.0.2" + linux)
    )
    assert cuda == ["cuda-toolkit", "nvidia-cudnn-cu13"]


def test_all_suites_that_fit_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suite in ("unit", "gpu", "comfy"):
        (tmp_path / "tests" / suite).mkdir(parents=True)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    beside = ["-n", "2", "--dist", "loadgroup"]
    assert run.pytest_arguments(["-q"], False, tmp_path) == ["tests/unit", "tests/comfy", *beside, "-q"]
    assert run.pytest_arguments([], True, tmp_path) == ["tests/unit", "tests/gpu", "tests/comfy"]


def test_files_that_the_user_names_replace_the_suites(tmp_path: Path) -> None:
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    (tmp_path / "tests" / "unit" / "test_a.py").touch()
    named = ["-x", "tests/unit/test_a.py::test_b"]
    assert run.pytest_arguments(named, True, tmp_path) == named
    assert run.pytest_arguments(["-k", "lora"], True, tmp_path) == ["tests/unit", "-k", "lora"]


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("Failed to establish a new connection: Temporary failure in name resolution", "reach"),
        ("WARNING: Retrying after ProxyError\nERROR: No matching distribution found for torch", "reach"),
        ("ERROR: No matching distribution found for torch==2.13.0", "3.10 to 3.13"),
        ("ensurepip is not available. On Debian/Ubuntu systems, you need python3-venv", "python3-venv"),
        ("/usr/bin/python3: No module named venv", "python3-venv"),
        ("SSLError: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
        ("PermissionError: [Errno 13] Permission denied: 'x'", "could not be written"),
        ("Segmentation fault", "pip.log"),
    ],
)
def test_failures_are_explained(output: str, advice: str) -> None:
    assert advice in run.explain(output)


def test_stamp_changes_with_the_hardware_alone() -> None:
    assert run.stamp("None []") == run.stamp("None []")
    assert run.stamp("None []") != run.stamp("/usr/bin/nvidia-smi ['0000:01:00.0']")


def test_torn_packages_are_forgotten_and_whole_ones_kept(tmp_path: Path) -> None:
    for name in ("torch-2.13.0.dist-info", "numpy-2.0.dist-info"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").touch()
    (tmp_path / "numpy-2.0.dist-info" / "INSTALLER").write_text("pip\n")
    run.remove_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["numpy-2.0.dist-info"]


def test_packages_are_those_of_the_project_file() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [requirement for requirement in run.PACKAGES if f'"{requirement}"' not in project] == []


def test_triton_is_added_where_torch_brought_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(run, "VENV", tmp_path)
    monkeypatch.setattr(run, "checked", lambda command, doing: asked.append(command) or "")
    monkeypatch.setattr(run.platform, "system", lambda: "Linux")
    for machine, gpu, wanted in (("x86_64", "", True), ("aarch64", "", False), ("x86_64", "NVIDIA H100", False)):
        monkeypatch.setattr(run.platform, "machine", lambda machine=machine: machine)
        asked.clear()
        run.add_triton(Path("python"), gpu)
        assert [command[-1] for command in asked] == [run.TRITON] * wanted
    (tmp_path / "lib" / "python3.11" / "site-packages" / "triton-3.6.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(run.platform, "machine", lambda: "x86_64")
    run.add_triton(Path("python"), "")
    assert asked == []


def test_requirements_leave_the_torch_of_comfyui_alone() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[^\w.-]", line)[0] for line in lines if line and not line.startswith("#")]
    # None of these depends on torch, or on anything that does.
    assert set(names) <= {"safetensors", "numpy", "packaging"}


@pytest.mark.parametrize("arguments", [[], ["install"], ["--help"]])
def test_usage(clone: Path, arguments: list[str]) -> None:
    done = start(clone, *arguments)
    assert done.returncode == 2
    assert "run.py demo" in done.stderr
    assert "run.py test" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_virtual_environment_of_the_users_own_is_not_touched(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    done = start(clone, "test")
    assert done.returncode == 1
    assert "was not made by run.py" in done.stderr
    assert [path.name for path in (clone / ".venv").iterdir()] == ["pyvenv.cfg"]


def test_python_without_venv(clone: Path) -> None:
    (clone / "venv.py").write_text("raise SystemExit('ensurepip is not available')")  # python -m finds it first
    done = start(clone, "demo")
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_network(clone: Path) -> None:
    done = start(clone, "test")
    assert done.returncode == 1
    assert "Check the network or proxy" in done.stderr
    assert "Traceback" not in done.stderr


@posix_only
def test_second_run_starts_at_once_and_passes_the_exit_code_on(clone: Path) -> None:
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    stamp = "import run; run.write_state(gpu='', stamp=run.stamp(run.hardware_hint()))"
    subprocess.run([sys.executable, "-c", stamp], cwd=clone, check=True, timeout=60)
    (clone / "demo.py").write_text("import sys; print('demo', sys.argv[1:]); sys.exit(7)")
    done = start(clone, "demo", "--steps", "2")
    assert (done.returncode, done.stdout) == (7, "demo ['--steps', '2']\n")
