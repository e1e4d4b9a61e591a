"""Our nodes as guests: memory given back, cancel, errors that an artist can act on, files in their place."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from tests.comfy.conftest import ROOT
from tests.comfy.graph import FluxGraph, Graph, Link
from tests.comfy.models import DEV
from tests.comfy.pack import ON_CPU, TOLERANCE, Said, compiled, run
from tests.comfy.process import ServerProcess
from tests.comfy.server import CancelledError, NodeError, Server
from tests.comfy.tensors import relative_error

pytestmark = pytest.mark.comfy

needs_no_gpu = pytest.mark.skipif(not ON_CPU, reason="the server has a GPU")
CANCEL_SECONDS = 2
BLOCK_BYTES = 4 * sum(rows * columns for rows, columns in DEV.block_linears().values())
"""In fp32, as a CPU computes; biases and norms come on top."""
NODE = "TRT Compile Transformer"


def sampled(server: Server, unet: str = "flux_dev.safetensors", **options: object) -> tuple[torch.Tensor, Said]:
    graph = FluxGraph()
    node = compiled(graph, graph.unet(unet), **options)
    return run(server, graph, graph.sample(node, graph.text()), node)


def memory(server: Server) -> dict:
    graph = FluxGraph()
    node = graph.add("Test_Memory", nonce=graph.nonce)
    return json.loads(server.submit(graph).ui(node)["text"][0])


def test_comfyui_knows_what_is_bound_and_free_gives_it_back(server: Server) -> None:
    server.free()
    before = memory(server)
    first, _ = sampled(server)
    graph = FluxGraph()
    node = compiled(graph, graph.unet())
    latent = graph.sample(node, graph.text())
    graph.add("Test_SaveLatent", samples=latent, path=str(server.scratch / "held.safetensors"))
    held = graph.add("Test_Memory", nonce=graph.nonce)
    while_loaded = json.loads(server.submit(graph).ui(held)["text"][0])
    assert {"Flux", "TRTWeights"} <= set(while_loaded["loaded"])
    assert while_loaded["bytes"] - before["bytes"] > BLOCK_BYTES
    server.free()
    after = memory(server)
    assert after["loaded"] == []
    assert after["bytes"] - before["bytes"] < 0.1 * BLOCK_BYTES
    again, said = sampled(server)
    assert said.builds == 1
    assert torch.equal(again, first)


def test_unloading_without_forgetting_the_nodes(server: Server) -> None:
    first, _ = sampled(server)
    server.free(free_memory=False)
    assert "TRTWeights" not in memory(server)["loaded"]
    assert torch.equal(sampled(server)[0], first)


def test_a_model_that_is_no_longer_used_takes_its_bound_weights_along(server: Server) -> None:
    server.free()
    before = memory(server)
    sampled(server)
    for _ in range(3):  # ComfyUI's cache drops models that a prompt does not use, after each of its nodes
        after = memory(server)
    assert after["bytes"] - before["bytes"] < 0.1 * BLOCK_BYTES


@pytest.mark.parametrize(("batch", "stage"), [(1, "inductor compiles"), (2, "First double block")])
def test_cancel_stops_a_build_and_leaves_everything_usable(
    server: Server, server_process: ServerProcess, batch: int, stage: str
) -> None:
    """For batch 2 Inductor compiles once more, after the plan is there."""

    def graph(batch: int) -> FluxGraph:
        graph = FluxGraph()
        node = compiled(graph, graph.unet(), backend="inductor")
        latent = graph.sample(node, graph.text(), latent=graph.picture(batch=batch), steps=2)
        graph.add("Test_SaveLatent", samples=latent, path=str(server.scratch / "cancelled.safetensors"))
        return graph

    if batch == 2:
        server.submit(graph(1))
    with server.events() as events:
        prompt_id = server.queue(graph(batch))
        events.wait_for(lambda event: event.kind == "text" and stage in event.data["text"])
        time.sleep(1)
        asked = time.monotonic()
        server.interrupt(prompt_id)
        with pytest.raises(CancelledError):
            server.wait(prompt_id)
        assert time.monotonic() - asked < CANCEL_SECONDS
    assert not [path for path in engine_folder(server_process).rglob("*") if path.name.endswith(".tmp")]
    plain = FluxGraph()
    reference = server.latent(plain, plain.sample(plain.unet(), plain.text()))
    assert relative_error(sampled(server)[0], reference) < TOLERANCE


def test_cancel_stops_sampling(server: Server) -> None:
    graph = FluxGraph()
    node = compiled(graph, graph.unet())
    latent = graph.sample(node, graph.text(), steps=2000)
    graph.add("Test_SaveLatent", samples=latent, path=str(server.scratch / "never.safetensors"))
    with server.events() as events:
        prompt_id = server.queue(graph)
        events.wait_for(lambda event: event.kind == "progress" and event.data["value"] >= 2)
    asked = time.monotonic()
    server.interrupt(prompt_id)
    with pytest.raises(CancelledError):
        server.wait(prompt_id)
    assert time.monotonic() - asked < CANCEL_SECONDS
    assert sampled(server)[1].compiled == 4


def engine_folder(process: ServerProcess) -> Path:
    return process.models / "tensorrt" / "trt_core"


def test_plans_are_kept_under_models_and_never_in_the_pack(server: Server, server_process: ServerProcess) -> None:
    sampled(server)
    assert list(engine_folder(server_process).rglob("plan.json"))
    assert not [path for path in ROOT.rglob("plan.json") if ".git" not in path.parts]


def error(server: Server, graph: Graph, latent: Link) -> NodeError:
    with pytest.raises(NodeError) as caught:
        server.latent(graph, latent)
    return caught.value


def test_another_model_is_refused_on_our_node(server: Server) -> None:
    graph = FluxGraph()
    node = compiled(graph, graph.add("Test_OtherModel"))
    caught = error(server, graph, graph.sample(node, graph.text()))
    assert caught.node_type == "TRT_CompileTransformer"
    for words in (NODE, "SomeModel, not FLUX.1", '"model"', "take this node out"):
        assert words in caught.message


def test_gguf_is_refused_on_our_node(server: Server) -> None:
    graph = FluxGraph()
    node = compiled(graph, graph.add("Test_Gguf", model=graph.unet("flux_prefixed.safetensors")))
    caught = error(server, graph, graph.sample(node, graph.text()))
    server.free()
    assert caught.node_type == "TRT_CompileTransformer"
    for words in (NODE, "GGUF", '"model"', ".safetensors"):
        assert words in caught.message


def test_a_size_outside_the_profile(server: Server) -> None:
    def graph(width: int, **options: object) -> tuple[FluxGraph, Link]:
        graph = FluxGraph()
        chosen = {"profile": "up to max_side", "max_side": 256, "outside_profile": "stop with an error", **options}
        node = compiled(graph, graph.unet(), **chosen)
        return graph, graph.sample(node, graph.text(), latent=graph.picture(width=width))

    server.latent(*graph(256))
    server.free()
    caught = error(server, *graph(512))
    for words in (NODE, "512 image tokens", "1 to 256 image tokens", '"profile"'):
        assert words in caught.message
    server.latent(*graph(512, outside_profile="build again"))


@needs_no_gpu
def test_tensorrt_without_a_gpu(server: Server) -> None:
    graph = FluxGraph()
    node = compiled(graph, graph.unet(), backend="tensorrt")
    caught = error(server, graph, graph.sample(node, graph.text()))
    for words in (NODE, "cannot be used here", '"backend"', 'backend="auto"'):
        assert words in caught.message
    assert sampled(server)[1].compiled == 4


@needs_no_gpu
def test_auto_says_what_it_does_without_a_gpu(server: Server) -> None:
    assert "4 of 4 blocks compiled: split eager" in sampled(server, backend="auto")[1].text


def test_a_missing_option_is_named(server: Server) -> None:
    graph = FluxGraph()
    node = compiled(graph, graph.unet(), backend="warp drive")
    with pytest.raises(RuntimeError, match="warp drive"):
        server.latent(graph, graph.sample(node, graph.text()))
