"""The list of test nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .conditioning import Conditioning, Fill, Mask, RandomLatent
from .control import Control
from .output import Nothing, SaveLatent, Text
from .patches import Patch, ReplaceBlock
from .spy import Spy


class TestExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Conditioning, Control, Fill, Mask, Nothing, Patch, RandomLatent, ReplaceBlock, SaveLatent, Spy, Text]
