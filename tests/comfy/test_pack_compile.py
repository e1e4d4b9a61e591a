"""Compiled FLUX in a real graph equals ComfyUI's own run, whatever the graph does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.comfy.graph import FluxGraph, Link
from tests.comfy.pack import TOLERANCE, Said, both
from tests.comfy.server import Server
from tests.comfy.tensors import relative_error

pytestmark = pytest.mark.comfy

Compile = Callable[[Link], Link]


def assert_equal(server: Server, build: Callable[[FluxGraph, Compile], Link], blocks: int = 4) -> Said:
    reference, latent, said = both(server, build)
    assert relative_error(latent, reference) < TOLERANCE
    assert said.compiled == blocks
    return said


def test_the_node_is_there_with_its_options_folded(server: Server) -> None:
    info = server.object_info("TRT_CompileTransformer")
    assert info is not None
    assert (info["category"], info["output"]) == ("TensorRT", ["MODEL"])
    inputs = info["input"]["required"]
    folded = [name for name, (_, options) in inputs.items() if options.get("advanced")]
    assert folded == ["attention", "base_weights", "profile", "max_side", "max_batch", "outside_profile"]
    assert all(options.get("tooltip") for _, options in inputs.values())


@pytest.mark.parametrize("unet", ["dev", "schnell", "prefixed", "fp8"])
def test_models(server: Server, unet: str) -> None:
    assert_equal(server, lambda g, c: g.sample(c(g.unet(f"flux_{unet}.safetensors")), g.text()))
