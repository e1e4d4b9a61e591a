"""`python -m trt_core.cache` as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trt_core.cache import main
from trt_core.engine_cache import EngineCache, EngineKey
from trt_core.engine_manifest import MANIFEST
from trt_core.gpu import environment

ROOT = Path(__file__).resolve().parents[2]
INFO = {"segment": "double_qkv", "img_tokens": 4096, "times": [1, 2]}


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    cache = EngineCache(tmp_path / "cache")
    cache.put(EngineKey("engine", {"segment": "double_qkv"}), {"engine.trt": bytes(1_500_000)}, INFO)
    entry = cache.put(EngineKey("plan", {}), {"plan.json": b"{}"}, {})
    used = time.time() - 3 * 86400
    os.utime(entry.path / MANIFEST, (used, used))
    return cache


def run(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    chosen = {"TRT_CORE_CACHE": str(folder)} if folder else {}
    return subprocess.run(
        [sys.executable, "-m", "trt_core.cache", *words],
        cwd=ROOT,
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_list_as_a_process(cache: EngineCache) -> None:
    done = run("list", folder=cache.folder)
    assert (done.returncode, done.stderr) == (0, "")
    header, first, second, total = done.stdout.splitlines()
    assert header.split() == ["GPU", "WHAT", "SIZE", "LAST", "USED"]
    gpu = "no GPU" if environment()["gpu"] == "none" else environment()["gpu"]
    assert first.startswith(gpu)
    assert first.split("  ")[1].strip() == "engine segment=double_qkv img_tokens=4096"
    assert first.endswith("now")
    assert "1.5 MB" in first
    assert "plan" in second
    assert second.endswith("2 B     3 d ago")
    assert total == f"2 entries, 1.5 MB, in {cache.folder}"


def test_error_as_a_process(cache: EngineCache, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"photo")
    done = run("import", str(tmp_path / "photo.png"), folder=cache.folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "was not imported" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["no-such-command"],
        ["list", "--max-gb", "1"],
        ["prune", "--max-gb", "-1"],
        ["prune", "--max-gb", "nan"],
        ["prune", "--max-age-days", "old"],
        ["export"],
        ["clear", "--folder"],
    ],
)
def test_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m trt_core.cache")


def test_folder_option_stands_before_or_after(cache: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--folder", str(cache.folder), "list"], ["list", "--all", "--folder", str(cache.folder)]):
        assert main(words) == 0
        assert "2 entries" in capsys.readouterr().out


def test_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--folder", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"No engines in {tmp_path / 'none'}.\n"


def test_prune(cache: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(cache.folder)]
    assert main(["prune", "--max-age-days", "2.5", *folder]) == 0
    assert "Deleted 1 entry, 2 B, and 0 leftovers.\nKept 1 entry, 1.5 MB" in capsys.readouterr().out
    assert main(["prune", "--max-gb", "0.001", *folder]) == 0
    assert "Deleted 1 entry, 1.5 MB" in capsys.readouterr().out
    assert cache.entries() == []


def test_clear_needs_yes(cache: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clear", "--folder", str(cache.folder)]) == 2
    assert "This deletes 2 entries, 1.5 MB" in capsys.readouterr().err
    assert len(cache.entries()) == 2
    assert main(["clear", "--yes", "--folder", str(cache.folder)]) == 0
    assert "Deleted 2 entries, 1.5 MB" in capsys.readouterr().out
    assert cache.entries() == []


def test_export_and_import(cache: EngineCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = str(tmp_path / "flux.bundle"), EngineCache(tmp_path / "other")
    assert main(["export", file, "--folder", str(cache.folder)]) == 0
    assert capsys.readouterr().out == f"Wrote 2 entries, 1.5 MB, to {file}\n"
    assert main(["import", file, "--folder", str(other.folder)]) == 0
    assert capsys.readouterr().out == f"Imported 2 entries, 1.5 MB, to {other.folder}\n"
    assert main(["import", file, "--folder", str(other.folder)]) == 0
    assert "2 were there before" in capsys.readouterr().out
    assert {entry.digest for entry in other.entries()} == {entry.digest for entry in cache.entries()}


def test_errors_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["list", "--folder", str(tmp_path / "file")]) == 1
    assert main(["export", str(tmp_path / "bundle"), "--folder", str(tmp_path / "none")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot be read" in err
    assert "no engine of this GPU" in err


def test_control_characters_stay_out_of_the_table(cache: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.put(EngineKey("engine", {}), {"engine.trt": b"x"}, {"segment": "\x1b[31m\n" + "x" * 200})
    assert main(["list", "--folder", str(cache.folder)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 5
    assert "\x1b" not in out
    assert max(map(len, out.splitlines()[:-1])) < 110
