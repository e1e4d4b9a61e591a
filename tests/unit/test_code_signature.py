"""Marks of this user's own processes: made once, asked for every time, refused where others could have made them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trt_core.code_signature import checked, signed
from trt_core.errors import CacheError
from trt_core.user_folders import settings_folder

NOT_OURS = "not written by this user's own processes"
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps a user's settings from others by their place")


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "settings"))
    return settings_folder()


def test_what_was_signed_comes_back_and_nothing_else() -> None:
    marked = signed(b"code", "a")
    assert checked(marked, "a") == b"code"
    forged = [marked[:-1] + b"x", b"\0" * 32 + b"code", marked[:31], b"", b"code"]
    for data, purpose in [(marked, "b"), *((data, "a") for data in forged)]:
        with pytest.raises(CacheError, match=NOT_OURS):
            checked(data, purpose)


def test_another_process_of_this_user_reads_it() -> None:
    marked = signed(b"code", "a")
    program = "import sys; from trt_core.code_signature import checked; print(checked(bytes.fromhex(sys.argv[1]), 'a'))"
    done = subprocess.run([sys.executable, "-c", program, marked.hex()], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "b'code'", done.stderr


def test_another_user_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = signed(b"code", "a")
    for variable in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "of somebody else"))
    with pytest.raises(CacheError, match=NOT_OURS):
        checked(marked, "a")


def test_processes_that_start_together_make_one_key(settings: Path) -> None:
    program = "from trt_core.code_signature import signed; print(signed(b'code', 'a').hex())"
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate(timeout=120)[0] for process in both}) == 1
    assert [path.name for path in settings.iterdir()] == ["code.key"]


@posix
def test_the_key_is_for_this_user_alone(settings: Path) -> None:
    marked = signed(b"code", "a")
    key = settings / "code.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    with pytest.raises(CacheError, match=r"other users can read .*code\.key; delete it"):
        checked(marked, "a")


@posix
def test_a_link_is_no_key(settings: Path, tmp_path: Path) -> None:
    signed(b"code", "a")
    (settings / "code.key").rename(tmp_path / "elsewhere")
    (settings / "code.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="key for compiled code cannot be used"):
        signed(b"code", "a")


def test_a_damaged_key_says_so(settings: Path) -> None:
    signed(b"code", "a")
    (settings / "code.key").write_bytes(b"short")
    with pytest.raises(CacheError, match=r"code\.key is damaged; delete it"):
        signed(b"code", "a")


def test_without_a_place_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for variable in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(CacheError, match="key for compiled code cannot be used"):
        signed(b"code", "a")


@posix
def test_the_folder_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/somewhere")
    assert settings_folder() == Path("/somewhere/.config/trt_core")
