"""FP8 nodes as guests: memory given back, cancel, one copy for many runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.comfy.checkpoint import FluxShape, write_flux
from tests.comfy.fp8 import fp8
from tests.comfy.graph import FluxGraph, Link
from tests.comfy.pack import compiled, run
from tests.comfy.process import ServerProcess
from tests.comfy.server import CancelledError, Server
from tests.comfy.tensors import relative_error

pytestmark = pytest.mark.comfy

SLOW = "slow.safetensors"
"""Large enough that quantizing takes a second or two."""
FP8_BYTES = 10**7
"""About what the test model's FP8 layers take."""


@pytest.fixture(scope="module")
def slow(server_process: ServerProcess) -> Path:
    folder = server_process.models / "diffusion_models"
    return write_flux(folder / SLOW, FluxShape(hidden=1024, double_blocks=1, single_blocks=4))


def memory(server: Server) -> dict:
    graph = FluxGraph()
    node = graph.add("Test_Memory", nonce=graph.nonce)
    return json.loads(server.submit(graph).ui(node)["text"][0])


def quantized(server: Server, lora: str | None = None, **options: object) -> torch.Tensor:
    graph = FluxGraph()
    unet = graph.unet() if lora is None else graph.lora(graph.unet(), lora)
    return server.latent(graph, graph.sample(fp8(graph, unet, **options), graph.text()))


def test_everything_is_given_back(server: Server) -> None:
    server.free()
    before = memory(server)
    first = quantized(server)
    quantized(server, "a.safetensors")
    quantized(server, granularity="per tensor")
    server.free()
    after = memory(server)
    assert after["loaded"] == []
    assert after["bytes"] - before["bytes"] < 0.1 * FP8_BYTES
    assert torch.equal(quantized(server), first)


def test_a_lora_before_the_node_makes_no_second_copy(server: Server) -> None:
    """The node runs again for each LoRA; the weights are the same, so they are quantized once."""
    server.free()
    stages = []
    for lora in ("a.safetensors", "b.safetensors"):
        with server.events() as events:
            graph = FluxGraph()
            node = fp8(graph, graph.lora(graph.unet(), lora))
            server.latent(graph, graph.sample(node, graph.text()))
            events.wait_for(lambda event: event.kind == "executing" and event.data["node"] is None)
            stages.append("".join(events.texts(node.node_id)))
    assert "Measuring FP8" in stages[0]
    assert "Quantizing to FP8" in stages[0]
    assert "Measuring FP8" not in stages[1]
    assert "Quantizing to FP8" not in stages[1]


def test_weights_are_bound_anew_where_only_mean_inputs_differ(server: Server) -> None:
    """Biases made with other means would stay otherwise: recipes with and without them are equal to `==`. With them the
    picture is another, and without them again the first one, bit for bit."""
    server.free()
    loads, latents = [], []
    for conditioned in (False, False, True, False):
        with server.events() as events:
            graph = FluxGraph()
            options = {"conditioning": graph.text(seed=4), "latent": graph.empty_latent()} if conditioned else {}
            node = compiled(graph, fp8(graph, graph.unet(), **options))
            latents.append(server.latent(graph, graph.sample(node, graph.text())))
            events.wait_for(lambda event: event.kind == "executing" and event.data["node"] is None)
            loads.append("Loading weights" in "".join(events.texts(node.node_id)))
    assert loads == [True, False, True, True]
    assert torch.equal(latents[1], latents[0])
    assert torch.equal(latents[3], latents[0])
    assert 0 < relative_error(latents[2], latents[0]) < 0.1


def cancelled_at(server: Server, graph: FluxGraph, stage: str) -> None:
    with server.events() as events:
        prompt_id = server.queue(graph)
        events.wait_for(lambda event: event.kind == "text" and stage in event.data["text"])
        server.interrupt(prompt_id)
        with pytest.raises(CancelledError):
            server.wait(prompt_id)


@pytest.mark.parametrize("stage", ["Measuring FP8", "Quantizing to FP8", "Calibrating FP8"])
def test_cancel(server: Server, slow: Path, stage: str) -> None:
    def graph() -> tuple[FluxGraph, Link]:
        graph = FluxGraph()
        options = {"conditioning": graph.text(seed=4), "latent": graph.empty_latent(64, 64)}
        options = {"activations": "static", **options} if stage.startswith("Calib") else {}
        node = fp8(graph, graph.unet(SLOW), **options)
        latent = graph.sample(node, graph.text(), steps=1, latent=graph.empty_latent(64, 64))
        graph.add("Test_SaveLatent", samples=latent, path=str(server.scratch / "cancelled.safetensors"))
        return graph, latent

    server.free()
    cancelled_at(server, graph()[0], stage)
    server.submit(graph()[0])


def test_cancel_leaves_no_file(server: Server, server_process: ServerProcess, slow: Path) -> None:
    graph = FluxGraph()
    graph.add("TRT_SaveFp8Model", model=fp8(graph, graph.unet(SLOW)), filename="cancelled", overwrite=False)
    cancelled_at(server, graph, "Writing FP8 model")
    folder = server_process.models / "diffusion_models"
    assert [path.name for path in folder.rglob("*") if path.name.startswith((".tmp-", "cancelled"))] == []


def test_switching_between_fp8_and_full_precision(server: Server) -> None:
    """One model, compiled both ways in turn: each run's bits are those of its first."""
    graphs = {}
    for in_fp8 in (True, False, True, False):
        graph = FluxGraph()
        unet = graph.unet()
        node = compiled(graph, fp8(graph, unet) if in_fp8 else unet)
        latent, said = run(server, graph, graph.sample(node, graph.text()), node)
        assert ("26 layers in FP8" in said.text) is in_fp8
        assert torch.equal(latent, graphs.setdefault(in_fp8, latent))


def test_lora_hooks_run_in_full_precision_and_are_said(server: Server) -> None:
    graph = FluxGraph()
    node = fp8(graph, graph.unet())
    hooks = graph.add("CreateHookLoraModelOnly", lora_name="a.safetensors", strength_model=1.0)
    text = graph.add(
        "ConditioningSetProperties", cond_NEW=graph.text(), hooks=hooks, strength=1.0, set_cond_area="default"
    )
    latent, said = run(server, graph, graph.sample(node, text), node)
    assert "not in FP8" in said.text
    assert "LoRA hooks" in said.text
    assert latent.isfinite().all()
