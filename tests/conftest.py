"""How tests run side by side (`run.py` asks for it where there is no GPU), and where they keep a user's key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_COMFY = Path(__file__).parent / "comfy"


@pytest.fixture(autouse=True, scope="session")
def _settings_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For this process and those that it starts: tests leave nothing in the settings of whoever runs them."""
    for variable in ("XDG_CONFIG_HOME", "APPDATA"):
        os.environ[variable] = str(tmp_path_factory.mktemp("settings"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share what they make; all tests of ComfyUI share one server, which does one thing at a time."""
    for item in items:
        group = _COMFY.name if _COMFY in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
