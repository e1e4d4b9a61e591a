"""How tests run side by side (`run.py` asks for it where there is no GPU)."""

from __future__ import annotations

from pathlib import Path

import pytest

_COMFY = Path(__file__).parent / "comfy"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share what they make; all tests of ComfyUI share one server, which does one thing at a time."""
    for item in items:
        group = _COMFY.name if _COMFY in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
