"""Our nodes in a test's graph, and what they say about a run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.comfy.graph import FluxGraph, Link
from tests.comfy.server import Server

ON_CPU = "--cpu" in os.environ.get("COMFYUI_FLAGS", "--cpu")
TOLERANCE = 1e-5 if ON_CPU else 0.03
"""Relative error of a compiled run against ComfyUI's own after all steps: in fp32 on a CPU, in bf16 on a GPU. The LoRA
a.safetensors alone changes the picture by 0.14."""


def compiled(graph: FluxGraph, model: Link, **options: object) -> Link:
    """TRT Compile Transformer; `options` as on the node."""
    return graph.add("TRT_CompileTransformer", model=model, **{"backend": "eager", **OPTIONS, **options})


OPTIONS = {
    "attention": "auto", "base_weights": "auto", "profile": "automatic", "max_side": 2048, "max_batch": 4,
    "outside_profile": "build again",
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """The text that was on the node after a run."""

    text: str

    @property
    def compiled(self) -> int:
        return self._number(r"(\d+) of \d+ blocks compiled")

    @property
    def touched(self) -> int:
        return 0 if "no layers touched" in self.text else self._number(r"LoRA: (\d+) layers touched")

    @property
    def merged(self) -> int:
        return 0 if "no layers touched" in self.text else self._number(r"\((\d+) merged")

    @property
    def builds(self) -> int:
        return self._number(r"builds: (\d+)")

    def _number(self, pattern: str) -> int:
        found = re.search(pattern, self.text)
        assert found is not None, self.text
        return int(found[1])


def run(server: Server, graph: FluxGraph, latent: Link, node: Link) -> tuple[torch.Tensor, Said]:
    """The latent, and what `node` said last."""
    with server.events() as events:
        samples = server.latent(graph, latent)
        deadline = time.monotonic() + 10
        while not (texts := events.texts(node.node_id)) and time.monotonic() < deadline:
            time.sleep(0.02)
        events.wait_for(lambda event: event.kind == "executing" and event.data["node"] is None)
        texts = events.texts(node.node_id)
    return samples, Said(texts[-1] if texts else "")


def both(
    server: Server, build: Callable[[FluxGraph, Callable[[Link], Link]], Link], **options: object
) -> tuple[torch.Tensor, torch.Tensor, Said]:
    """ComfyUI's own latent, the compiled one, and what the node said.

    `build(graph, compile_)` makes the graph up to the latent and puts `compile_` somewhere after the loader.
    """
    plain = FluxGraph()
    reference = server.latent(plain, build(plain, lambda model: model))
    graph, nodes = FluxGraph(), []

    def compile_(model: Link) -> Link:
        nodes.append(compiled(graph, model, **options))
        return nodes[-1]

    result = build(graph, compile_)
    latent, said = run(server, graph, result, nodes[-1])
    return reference, latent, said
