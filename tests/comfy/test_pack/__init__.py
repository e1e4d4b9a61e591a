"""Nodes for tests only: random conditioning, residuals, patches, a recorder of what ComfyUI calls when."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    from .extension import TestExtension

    return TestExtension()
