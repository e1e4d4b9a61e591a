"""Whether this user's own processes wrote some bytes: an HMAC with a random key that only this user can read.

Kept code is a pickle, which runs whatever its author wrote (`backends/inductor_code.py`). A sha256 in a manifest shows
damage and nothing else, because whoever writes the one can write the other. The key lies outside the cache: a cache
folder that is shared, copied from elsewhere or unpacked over this one brings no code that would be run.

Source: RFC 2104 (HMAC), with SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import secrets
import stat
import sys
from pathlib import Path

from .atomic_files import file_lock, read_regular, write_atomic
from .errors import CacheError
from .user_folders import settings_folder

_KEY_FILE = "code.key"
_KEY_BYTES = 32
_MARK_BYTES = hashlib.sha256().digest_size
_WAIT_SECONDS = 10.0


def signed(data: bytes, purpose: str) -> bytes:
    """`data` behind its mark (32 bytes). `purpose` is what the data is for: it does not pass for anything else.

    Makes the user's key at first use. Raises `CacheError` where there is no place for one.
    """
    return _mark(data, purpose) + data


def checked(marked: bytes, purpose: str) -> bytes:
    """The data that `signed` was given, by this user and for this purpose; raises `CacheError` for any other bytes."""
    mark, data = marked[:_MARK_BYTES], marked[_MARK_BYTES:]
    if not hmac.compare_digest(mark, _mark(data, purpose)):
        raise CacheError("It was not written by this user's own processes.")
    return data


def _mark(data: bytes, purpose: str) -> bytes:
    made = hmac.new(_key(), purpose.encode() + b"\0", hashlib.sha256)
    made.update(data)
    return made.digest()


def _key() -> bytes:
    try:
        path = settings_folder() / _KEY_FILE
        return _read(path) if path.exists() else _made(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        raise CacheError(f"This user's key for compiled code cannot be used: {error}.") from error


def _made(path: Path) -> bytes:
    """The key, which another process may have made just before."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with file_lock(path.with_suffix(".lock"), _WAIT_SECONDS) as held:
        if not held:
            raise TimeoutError(errno.ETIMEDOUT, f"another process has held {path} for {_WAIT_SECONDS:.0f} s")
        if not path.exists():
            write_atomic(path, secrets.token_bytes(_KEY_BYTES), mode=0o600)
    return _read(path)


def _read(path: Path) -> bytes:
    key, seen = read_regular(path), path.stat()
    if len(key) != _KEY_BYTES:
        raise OSError(errno.EINVAL, f"{path} is damaged; delete it")
    if sys.platform != "win32" and (seen.st_uid != os.geteuid() or stat.S_IMODE(seen.st_mode) & 0o077):
        raise OSError(errno.EPERM, f"other users can read {path}; delete it")
    return key
