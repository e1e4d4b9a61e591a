"""TRT Engine Cache lists, prunes and clears what the other node has stored."""

from __future__ import annotations

import pytest

from tests.comfy.graph import FluxGraph, Graph
from tests.comfy.pack import compiled
from tests.comfy.process import ServerProcess
from tests.comfy.server import Server

pytestmark = pytest.mark.comfy


def did(server: Server, action: str, keep_gb: float = 10.0, unused_days: int = 90) -> str:
    graph = Graph()
    node = graph.add("TRT_EngineCache", action=action, keep_gb=keep_gb, unused_days=unused_days)
    return server.submit(graph).ui(node)["text"][0]


def store(server: Server) -> None:
    server.free()
    graph = FluxGraph()
    server.latent(graph, graph.sample(compiled(graph, graph.unet()), graph.text()))


def test_list_prune_and_clear(server: Server, server_process: ServerProcess) -> None:
    folder = server_process.models / "tensorrt" / "trt_core"
    did(server, "clear")
    assert did(server, "list").startswith("0 entries")
    store(server)
    listed = did(server, "list")
    assert listed.startswith("1 entries")
    assert str(folder) in listed
    assert "plan: " in listed
    assert "eager" in listed
    assert did(server, "prune").startswith("Deleted 0 entries")
    assert did(server, "list").startswith("1 entries")
    assert did(server, "prune", keep_gb=0.0).startswith("Deleted 1 entries")
    assert not list(folder.rglob("plan.json"))
    store(server)
    assert did(server, "clear").startswith("Deleted 1 entries")
    assert did(server, "list").startswith("0 entries")


def test_what_is_not_ours_stays(server: Server, server_process: ServerProcess) -> None:
    foreign = server_process.models / "tensorrt" / "other.engine"
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_bytes(b"another pack's")
    did(server, "clear")
    did(server, "prune", keep_gb=0.0)
    assert foreign.read_bytes() == b"another pack's"
    foreign.unlink()


def test_the_schema(server: Server) -> None:
    info = server.object_info("TRT_EngineCache")
    assert info is not None
    assert (info["category"], info["output_node"], info["output"]) == ("TensorRT", True, [])
