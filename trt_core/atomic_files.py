"""Files that are whole or absent, and locks that the operating system releases when a process dies."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}")
"""Full names of files and folders that `temporary` hands out; only these are swept."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NAME_SURROGATE = 0x20000000
"""Windows reparse tags with this bit (junctions, links) stand for another path, though `S_ISDIR` is true."""
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


def temporary(folder: Path) -> Path:
    """A path in `folder` that nobody else uses; nothing is created."""
    return folder / f".tmp-{uuid.uuid4().hex}"


def is_real_folder(path: Path) -> bool:
    """Whether `path` is a folder itself and no link to one."""
    try:
        seen = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(seen.st_mode) and not getattr(seen, "st_reparse_tag", 0) & _NAME_SURROGATE


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; `OSError` for anything else, a link included."""
    handle = os.open(path, os.O_RDONLY | _NO_LINKS | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def write_synced(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Creates the new file `path`, on disk when this returns. `mode`: who may use it, less the user's mask."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Creates or replaces `path`: a reader, or a crash at any moment, sees the old file or the new one."""
    staging = temporary(path.parent)
    try:
        write_synced(staging, data, mode)
        replace(staging, path)
    except BaseException:
        with suppress(OSError):
            staging.unlink()
        raise
    sync_folder(path.parent)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, patient where Windows refuses because another process reads the target for a moment."""
    for wait_seconds in (0.02, 0.2, 1.0):
        try:
            return os.replace(source, target)
        except PermissionError:
            if sys.platform != "win32":
                raise
            time.sleep(wait_seconds)
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut; Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_flat(path: Path) -> None:
    """Deletes `path`: a file, a link, or a folder with its files; links and folders in it stay."""
    if not is_real_folder(path):
        path.unlink(missing_ok=True)
        return
    with os.scandir(path) as children:
        for name in [child.name for child in children if _is_regular(child)]:
            (path / name).unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def _is_regular(child: os.DirEntry[str]) -> bool:
    return child.is_file(follow_symlinks=False)


# -- locks


def never() -> bool:
    """A cancel callback that does not cancel."""
    return False


@contextmanager
def file_lock(path: Path, timeout_seconds: float, cancelled: Callable[[], bool] = never) -> Iterator[bool]:
    """Holds the lock file `path`: True when held, False after `timeout_seconds` or when `cancelled()`.

    The lock ends with the process, however it ends, so none is ever stale. The file goes with the lock.
    Threads exclude each other too; one thread must not take the same lock twice. `OSError` where there are
    no locks.
    """
    handle = _wait(path, timeout_seconds, cancelled)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            _release(handle, path)


def _wait(path: Path, timeout_seconds: float, cancelled: Callable[[], bool]) -> int | None:
    give_up = time.monotonic() + timeout_seconds
    pause_seconds = 0.01
    while (handle := _try_lock(path)) is None:
        if cancelled() or time.monotonic() >= give_up:
            return None
        time.sleep(pause_seconds)
        pause_seconds = min(0.2, pause_seconds * 1.5)
    return handle


def _try_lock(path: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o666)
    try:
        _lock_now(handle)
        # The holder before us deleted the file when it let go; a lock on a deleted file excludes nobody.
        held = os.path.samestat(os.fstat(handle), os.lstat(path))
    except OSError as error:
        os.close(handle)
        if error.errno in _HELD or isinstance(error, FileNotFoundError):
            return None
        raise
    if not held:
        os.close(handle)
    return handle if held else None


def _lock_now(handle: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(handle: int, path: Path) -> None:
    if sys.platform != "win32":
        with suppress(OSError):
            path.unlink()
    os.close(handle)
    if sys.platform == "win32":
        with suppress(OSError):  # Windows deletes a file only when nobody else has it open
            path.unlink()
