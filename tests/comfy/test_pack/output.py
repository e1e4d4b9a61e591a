"""Output nodes: what a test reads back."""

from __future__ import annotations

from comfy_api.latest import io, ui
from safetensors.torch import save_file
from server import PromptServer

from .conditioning import CATEGORY, seed_input


class SaveLatent(io.ComfyNode):
    """Writes a latent's samples to a path, as they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_SaveLatent",
            category=CATEGORY,
            inputs=[io.Latent.Input("samples"), io.String.Input("path")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict, path: str) -> io.NodeOutput:
        tensor = samples["samples"].contiguous().cpu()
        save_file({"samples": tensor}, path)
        return io.NodeOutput(ui={"shape": list(tensor.shape)})


class Nothing(io.ComfyNode):
    """Runs, and is done: tells a test that the server's worker came by."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Nothing",
            category=CATEGORY,
            inputs=[seed_input("nonce")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, nonce: int) -> io.NodeOutput:
        return io.NodeOutput()


class Text(io.ComfyNode):
    """Shows a line on itself while it runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Test_Text",
            category=CATEGORY,
            inputs=[io.String.Input("text"), seed_input("nonce")],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,  # else an equal node's cached run would answer, and its id would be used
        )

    @classmethod
    def execute(cls, text: str, nonce: int) -> io.NodeOutput:
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(ui=ui.PreviewText(text))
