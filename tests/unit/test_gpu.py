"""Reasons, environments and package detection; packages are real metadata in a temporary site folder."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from trt_core import gpu
from trt_core.engine_cache import _GPU_FOLDER
from trt_core.engine_manifest import digest_of

ROOT = Path(__file__).resolve().parents[2]


def card(sm: tuple[int, int], name: str = "NVIDIA GeForce RTX 4090", driver: str = "580.82") -> gpu.GpuInfo:
    return gpu.GpuInfo(name, sm, 24 << 30, driver)


def install(site: Path, name: str, version: str, *packages: str) -> None:
    """Writes what pip leaves of a distribution: its metadata and empty packages."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("\n".join(packages) + "\n")
    (info / "RECORD").write_text("".join(f"{package}/__init__.py,,\n" for package in packages))
    for package in packages:
        (site / package).mkdir(exist_ok=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that Python searches, so that what is really installed does not matter."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize("name", ["gpu", "engine_cache", "engine_bundle", "cache"])
def test_import_is_free_of_torch(name: str) -> None:
    code = f"import sys, trt_core.{name}; sys.exit(int('torch' in sys.modules or 'tensorrt' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("sm", "fp8", "nvfp4"),
    [
        ((8, 6), False, False),
        ((8, 9), True, False),
        ((9, 0), True, False),
        ((10, 0), True, True),
        ((12, 0), True, True),
    ],
)
def test_precisions_by_compute_capability(sm: tuple[int, int], fp8: bool, nvfp4: bool) -> None:
    reasons = gpu.why_not_fp8(card(sm)), gpu.why_not_nvfp4(card(sm))
    assert [reason is None for reason in reasons] == [fp8, nvfp4]
    for reason in filter(None, reasons):
        assert "NVIDIA GeForce RTX 4090" in reason
        assert f"{sm[0]}.{sm[1]}" in reason


def test_no_gpu_is_a_reason() -> None:
    for question in (gpu.why_not_fp8, gpu.why_not_nvfp4, gpu.why_not_tensorrt):
        assert "no NVIDIA GPU" in (question(None) or "")


def test_tensorrt_needs_a_turing_card() -> None:
    assert "7.0" in (gpu.why_not_tensorrt(card((7, 0), "Tesla V100")) or "")


@pytest.mark.parametrize(
    ("name", "package"),
    [("NVIDIA GeForce RTX 4090", "torch-tensorrt-rtx"), ("NVIDIA H200", "torch-tensorrt")],
)
def test_missing_tensorrt_names_package_and_version(site: Path, name: str, package: str) -> None:
    reason = gpu._why_not_packages({**gpu.installed_packages(), "torch": "2.11.0+cu130"}, name)
    assert reason is not None
    assert f"{package}==2.11.0" in reason


def test_rtx_flavour_is_read_from_the_distribution(site: Path) -> None:
    install(site, "torch-tensorrt-rtx", "2.11.0", "torch_tensorrt")
    install(site, "tensorrt_rtx_cu12_bindings", "1.4.0.76", "tensorrt_rtx_bindings")
    install(site, "tensorrt", "10.15.1", "tensorrt")
    seen = gpu.installed_packages()
    assert seen["torch_tensorrt"] == "torch-tensorrt-rtx 2.11.0"
    assert (seen["tensorrt_flavour"], seen["tensorrt"]) == (
        "tensorrt_rtx",
        "tensorrt-rtx-cu12-bindings 1.4.0.76",
    )


def test_standard_flavour_is_read_from_the_distribution(site: Path) -> None:
    install(site, "torch_tensorrt", "2.11.0", "torch_tensorrt")
    install(site, "tensorrt_cu13_bindings", "10.15.1.29", "tensorrt_bindings")
    install(site, "tensorrt-rtx", "1.4.0.76", "tensorrt_rtx")
    seen = gpu.installed_packages()
    assert (seen["tensorrt_flavour"], seen["tensorrt"]) == ("tensorrt", "tensorrt-cu13-bindings 10.15.1.29")
    assert gpu._why_not_packages({**seen, "torch": "2.11.0+cu130"}, "NVIDIA H200") is None


def test_tensorrt_without_metadata_is_unknown(site: Path) -> None:
    install(site, "torch-tensorrt-rtx", "2.11.0", "torch_tensorrt")
    (site / "tensorrt_rtx").mkdir()
    (site / "tensorrt_rtx" / "__init__.py").write_text("")
    assert gpu.installed_packages()["tensorrt"] == "unknown"


def test_unfit_packages_are_reasons(site: Path) -> None:
    install(site, "torch-tensorrt-rtx", "2.11.0", "torch_tensorrt")
    seen = {**gpu.installed_packages(), "torch": "2.11.0+cu130"}
    assert "without tensorrt_rtx" in (gpu._why_not_packages(seen, "NVIDIA GeForce RTX 4090") or "")
    other = gpu._why_not_packages({**seen, "torch": "2.13.0"}, "NVIDIA GeForce RTX 4090") or ""
    assert "torch-tensorrt-rtx 2.11.0 does not fit torch 2.13.0" in other
    assert "torch-tensorrt-rtx==2.13" in other
    assert "2.99.0" in (gpu._why_not_packages({**seen, "torch": "2.99.0"}, "NVIDIA H200") or "")


def test_environment_holds_the_gpu() -> None:
    seen = gpu.environment(card((8, 9)))
    assert (seen["gpu"], seen["sm"], seen["driver"]) == ("NVIDIA GeForce RTX 4090", "8.9", "580.82")
    assert all(isinstance(value, str) and value for value in seen.values())
    assert seen["torch"].startswith(importlib.metadata.version("torch"))


@pytest.mark.parametrize("other", [card((8, 9), name="NVIDIA L40"), card((9, 0)), card((8, 9), driver="581.10")])
def test_digest_depends_on_the_gpu(other: gpu.GpuInfo) -> None:
    digests = {digest_of("engine", {}, gpu.environment(each)) for each in (card((8, 9)), other)}
    assert len(digests) == 2


def test_current_gpu_agrees_with_torch() -> None:
    import torch

    seen = gpu.current_gpu()
    assert (seen is not None) == torch.cuda.is_available()
    assert gpu.gpu_count() == (torch.cuda.device_count() if seen else 0)
    assert gpu.environment() in gpu.environments()
    assert (gpu.environment()["gpu"] == "none") == (seen is None)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200-sm89"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "nvidia-geforce-rtx-4090-laptop-gpu-sm89"),
        ("../../etc", "etc-sm89"),
        ("显卡", "gpu-sm89"),
    ],
)
def test_slug_is_a_safe_folder_name(name: str, slug: str) -> None:
    assert gpu.gpu_slug(gpu.environment(card((8, 9), name))) == slug
    assert _GPU_FOLDER.fullmatch(slug)


@pytest.mark.parametrize(
    ("version", "short"),
    [("580.82.07", "580.82"), ("2.11.0+cu130", "2.11"), ("535", "535"), ("?", "unknown")],
)
def test_major_minor(version: str, short: str) -> None:
    assert gpu.major_minor(version) == short


def test_packages_are_found_as_importlib_finds_them(site: Path) -> None:
    """The quick search must not change what plans belong to: names with a list of packages, and without one."""
    install(site, "torch-tensorrt-rtx", "2.11.0", "torch_tensorrt")
    install(site, "tensorrt_rtx_cu12_bindings", "1.4.0.76", "tensorrt_rtx_bindings", "tensorrt_rtx")
    install(site, "torch", "2.11.0", "torch", "torchgen", "functorch")
    install(site, "triton-windows", "3.6.0", "triton")
    install(site, "numpy", "2.3", "numpy")
    for info in site.glob("t*.dist-info"):
        (info / "top_level.txt").unlink()
    expected = importlib.metadata.packages_distributions()
    assert expected.pop("numpy") == ["numpy"]
    assert gpu._providers() == expected
    assert gpu.installed_packages()["triton"] == "3.6.0"
