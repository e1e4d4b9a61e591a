"""Where this system keeps what belongs to one user: caches, and settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_NAME = "trt_core"


def cache_folder() -> Path:
    """%LOCALAPPDATA%, XDG_CACHE_HOME or ~/.cache, then "trt_core"; raises `RuntimeError` for a user without a home."""
    return _base("LOCALAPPDATA", "XDG_CACHE_HOME", ".cache") / _NAME


def settings_folder() -> Path:
    """%APPDATA%, XDG_CONFIG_HOME or ~/.config, then "trt_core"; raises `RuntimeError` for a user without a home."""
    return _base("APPDATA", "XDG_CONFIG_HOME", ".config") / _NAME


def _base(on_windows: str, elsewhere: str, in_home: str) -> Path:
    base = Path(os.environ.get(on_windows if sys.platform == "win32" else elsewhere, ""))
    # The XDG specification says to ignore a relative path.
    return base if base.is_absolute() else Path.home() / in_home
