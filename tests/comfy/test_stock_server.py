"""The server as the harness needs it: packs load, errors name nodes, progress, cancel and free work."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from tests.comfy.graph import FluxGraph, Graph
from tests.comfy.models import UNKNOWN
from tests.comfy.process import ServerProcess, ServerStartError
from tests.comfy.server import CancelledError, NodeError, PromptError, Server

pytestmark = pytest.mark.comfy

CANCEL_SECONDS = 10
"""Generous: what is tested is that it stops long before its 2000 steps are over."""


def test_every_linked_pack_loads(server_process: ServerProcess) -> None:
    log = server_process.log_text()
    assert "IMPORT FAILED" not in log
    assert "Error while calling comfy_entrypoint" not in log
    assert "Cannot import" not in log


def test_the_test_nodes_are_registered(server: Server) -> None:
    info = server.object_info("Test_Conditioning")
    assert info is not None
    assert info["output"] == ["CONDITIONING"]
    assert info["python_module"] == "custom_nodes.test_pack"
    assert server.object_info("Test_DoesNotExist") is None


def test_nothing_is_written_outside_the_base_folder(server: Server, server_process: ServerProcess) -> None:
    (arguments,) = (server.get("/system_stats")["system"]["argv"],)
    for option in ("--base-directory", "--models-directory"):
        assert Path(arguments[arguments.index(option) + 1]).is_relative_to(server_process.base)


def test_a_missing_input_is_rejected_with_the_nodes_name(server: Server) -> None:
    graph = Graph()
    node = graph.add("Test_SaveLatent", path="nowhere")
    with pytest.raises(PromptError) as error:
        server.submit(graph)
    assert error.value.node_errors[node.node_id]["errors"][0]["details"] == "samples"


def test_an_error_names_the_node(server: Server) -> None:
    graph = FluxGraph()
    model = graph.unet(UNKNOWN)
    with pytest.raises(NodeError, match="Could not detect model type") as error:
        server.latent(graph, graph.sample(model, graph.text()))
    assert (error.value.node_id, error.value.node_type) == (model.node_id, "UNETLoader")


def test_the_server_works_on_after_an_error(server: Server) -> None:
    graph = Graph()
    node = graph.add("Test_Nothing", nonce=1)
    assert server.submit(graph).prompt_id
    again = Graph()
    again.add("Test_Nothing", nonce=1)
    assert server.submit(again).cached == {node.node_id}


def test_loaders_stay_cached_while_sampling_runs_anew(server: Server) -> None:
    def run() -> tuple[frozenset[str], str, str]:
        graph = FluxGraph()
        model = graph.unet()
        latent = graph.sample(model, graph.text())
        graph.add("Test_SaveLatent", samples=latent, path=str(server.scratch / "cached.safetensors"))
        return server.submit(graph).cached, model.node_id, latent.node_id

    run()
    cached, loader, sampler = run()
    assert loader in cached
    assert sampler not in cached


def test_progress_arrives_while_sampling(server: Server) -> None:
    with server.events() as events:
        graph = FluxGraph()
        latent = graph.sample(graph.unet(), graph.text(), steps=4)
        server.latent(graph, latent)
        events.wait_for(lambda event: event.kind == "executing" and event.data["node"] is None)
        steps = [event.data["value"] for event in events.of("progress", latent.node_id)]
    assert steps[-1] == 4
    assert steps == sorted(steps)


def test_texts_on_nodes_arrive(server: Server) -> None:
    with server.events() as events:
        graph = FluxGraph()
        nodes = [graph.add("Test_Text", text="3 layers, 12 ms", nonce=graph.nonce) for _ in range(2)]
        result = server.submit(graph)
        for node in nodes:
            events.wait_for(lambda event, node=node: event.kind == "text" and event.data["node"] == node.node_id)
            assert events.texts(node.node_id) == ["3 layers, 12 ms"]
            assert result.ui(node)["text"] == ["3 layers, 12 ms"]


def test_cancel_stops_sampling_and_leaves_everything_usable(server: Server) -> None:
    graph = FluxGraph()
    latent = graph.sample(graph.unet(), graph.text(), steps=2000)
    graph.add("Test_SaveLatent", samples=latent, path=str(server.scratch / "never.safetensors"))
    with server.events() as events:
        prompt_id = server.queue(graph)
        events.wait_for(lambda event: event.kind == "progress" and event.data["value"] >= 2)
    asked = time.monotonic()
    server.interrupt(prompt_id)
    with pytest.raises(CancelledError) as error:
        server.wait(prompt_id)
    assert error.value.node_type == "KSampler"
    assert time.monotonic() - asked < CANCEL_SECONDS
    again = FluxGraph()
    assert server.latent(again, again.sample(again.unet(), again.text())).isfinite().all()


def test_free_lets_go_of_the_model_and_the_next_run_gives_the_same_bits(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def run() -> tuple[torch.Tensor, list[str]]:
        graph = FluxGraph()
        model = graph.add("Test_Spy", model=graph.unet(), path=str(path))
        path.unlink(missing_ok=True)
        latent = server.latent(graph, graph.sample(model, graph.text()))
        return latent, events()

    def events() -> list[str]:
        return [json.loads(line)["event"] for line in path.read_text().splitlines()]

    before, _ = run()
    server.free()
    assert events()[-1] == "on_detach_after"
    again, loaded = run()
    assert "on_load_after" in loaded
    assert torch.equal(again, before)


def test_a_server_that_cannot_start_says_why(comfyui: tuple[Path, Path], tmp_path: Path) -> None:
    process = ServerProcess(*comfyui, tmp_path / "base", flags=("--no-such-flag",))
    process.base.mkdir()
    with pytest.raises(ServerStartError, match="unrecognized arguments: --no-such-flag"):
        process.start()
    assert not process.running()
