"""The list of test nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .bound import FreeBound, OtherWeights
from .conditioning import Conditioning, Fill, Mask, RandomLatent
from .control import Control
from .foreign import Gguf, Memory, OtherModel
from .output import Nothing, SaveLatent, Text
from .patches import Patch, ReplaceBlock, ReplaceModule
from .spy import Spy


class TestExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Conditioning, Control, Fill, FreeBound, Gguf, Mask, Memory, Nothing, OtherModel, OtherWeights, Patch,
            RandomLatent, ReplaceBlock, ReplaceModule, SaveLatent, Spy, Text,
        ]  # fmt: skip
