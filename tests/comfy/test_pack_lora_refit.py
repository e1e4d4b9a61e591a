"""TRT LoRA Refit gives the bits of ComfyUI's own loaders, alone and with TRT Compile Transformer."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from tests.comfy.checkpoint import write_lora_kohya
from tests.comfy.graph import FluxGraph, Link
from tests.comfy.models import DEV, UNKNOWN
from tests.comfy.pack import compiled, run
from tests.comfy.process import ServerProcess
from tests.comfy.server import NodeError, Server
from tests.comfy.tensors import differs

pytestmark = pytest.mark.comfy

A, B = "a.safetensors", "b.safetensors"
NODE = "TRT LoRA Refit"


def refit(graph: FluxGraph, model: Link, *slots: tuple[str, float, bool], **options: object) -> Link:
    widgets: dict[str, object] = {"lora_1": "none", "strength_1": 1.0, "on_1": True}
    for number, (file, strength, on) in enumerate(slots, start=1):
        widgets |= {f"lora_{number}": file, f"strength_{number}": strength, f"on_{number}": on}
    return graph.add("TRT_LoraRefit", model=model, **widgets, **options)


def stock(server: Server, *loras: tuple[str, float], compile_: bool = False) -> torch.Tensor:
    graph = FluxGraph()
    model = graph.unet()
    model = compiled(graph, model) if compile_ else model
    for lora in loras:
        model = graph.lora(model, *lora)
    return server.latent(graph, graph.sample(model, graph.text()))


CASES: dict[str, tuple[list, list]] = {
    "one": ([(A, 1.0, True)], [(A, 1.0)]),
    "diffusers names": ([(B, 0.6, True)], [(B, 0.6)]),
    "three": ([(A, 0.5, True), (B, 0.7, True), (A, -0.2, True)], [(A, 0.5), (B, 0.7), (A, -0.2)]),
    "one off": ([(A, 0.5, False), (B, 0.7, True)], [(B, 0.7)]),
    "strength 0": ([(A, 0.0, True)], []),
    "none": ([], []),
}


@pytest.mark.parametrize("compile_", [False, True], ids=["alone", "compiled"])
@pytest.mark.parametrize(("slots", "loras"), CASES.values(), ids=CASES.keys())
def test_same_bits_as_the_stock_loaders(server: Server, slots: list, loras: list, compile_: bool) -> None:
    reference = stock(server, *loras, compile_=compile_)
    graph = FluxGraph()
    model = graph.unet()
    model = compiled(graph, model) if compile_ else model
    latent = server.latent(graph, graph.sample(refit(graph, model, *slots), graph.text()))
    assert torch.equal(latent, reference)


def test_before_and_after_the_compile_node(server: Server) -> None:
    graph = FluxGraph()
    node = compiled(graph, refit(graph, graph.unet(), (A, 1.0, True)))
    latent = server.latent(graph, graph.sample(node, graph.text()))
    assert torch.equal(latent, stock(server, (A, 1.0), compile_=True))


def test_it_says_what_a_switch_touched(server: Server) -> None:
    def switched(*slots: tuple[str, float, bool]) -> str:
        graph = FluxGraph()
        node = refit(graph, compiled(graph, graph.unet()), *slots)
        return run(server, graph, graph.sample(node, graph.text()), node)[1].text

    switched()
    layers = len(DEV.block_linears())
    assert f"LoRA: {layers} layers touched ({layers} merged, 0 restored)" in switched((A, 1.0, True))
    assert "no layers touched" in switched((A, 1.0, True))
    assert f"({layers} merged" in switched((A, 0.9, True))
    assert f"(0 merged, {layers} restored)" in switched((A, 0.9, False))


def test_alone_it_says_what_it_applied(server: Server) -> None:
    graph = FluxGraph()
    node = refit(graph, graph.unet(), (A, 0.5, True), (B, 1.0, True))
    said = run(server, graph, graph.sample(node, graph.text()), node)[1].text
    assert f"{A} 0.5: {len(DEV.block_linears())} layers" in said
    assert "ready in" in said


def test_a_file_saved_again_is_read_again(server: Server, server_process: ServerProcess) -> None:
    path = server_process.models / "loras" / "changing.safetensors"

    def sampled() -> torch.Tensor:
        graph = FluxGraph()
        model = refit(graph, graph.unet(), (path.name, 1.0, True))
        return server.latent(graph, graph.sample(model, graph.text()))

    write_lora_kohya(path, DEV, seed=5)
    first = sampled()
    write_lora_kohya(path, DEV, seed=6)
    os.utime(path, (0, 1))
    assert differs(sampled(), first)
    write_lora_kohya(path, DEV, seed=5)
    assert torch.equal(sampled(), first)
    path.unlink()


@pytest.mark.parametrize("keep_mb", [0, 2048])
def test_the_memory_limit_changes_no_result(server: Server, keep_mb: int) -> None:
    reference = stock(server, (A, 1.0), (B, 1.0))
    graph = FluxGraph()
    model = refit(graph, graph.unet(), (A, 1.0, True), (B, 1.0, True), keep_mb=keep_mb)
    assert torch.equal(server.latent(graph, graph.sample(model, graph.text())), reference)


def test_a_lora_for_another_model_names_node_and_widget(server: Server, server_process: ServerProcess) -> None:
    path = server_process.models / "loras" / "other.safetensors"
    shutil.copy(server_process.models / "diffusion_models" / "flux_dev.safetensors", path)
    graph = FluxGraph()
    node = refit(graph, graph.unet(), (A, 1.0, True), (path.name, 1.0, True))
    with pytest.raises(NodeError) as error:
        server.latent(graph, graph.sample(node, graph.text()))
    path.unlink()
    assert error.value.node_type == "TRT_LoraRefit"
    for words in (NODE, path.name, '"lora_2"', "changes nothing in this model"):
        assert words in error.value.message


def test_a_damaged_file_names_the_node(server: Server, server_process: ServerProcess) -> None:
    path = server_process.models / "loras" / "damaged.safetensors"
    path.write_bytes((server_process.models / "loras" / A).read_bytes()[:1000])
    graph = FluxGraph()
    with pytest.raises(NodeError) as error:
        server.latent(graph, graph.sample(refit(graph, graph.unet(), (path.name, 1.0, True)), graph.text()))
    path.unlink()
    for words in (NODE, path.name, "damaged"):
        assert words in error.value.message


def test_the_schema(server: Server) -> None:
    info = server.object_info("TRT_LoraRefit")
    assert info is not None
    assert list(info["input"]["required"]) == ["model", "lora_1", "strength_1", "on_1"]
    assert info["input"]["optional"]["keep_mb"][1]["advanced"] is True
    assert A in info["input"]["required"]["lora_1"][1]["options"]
    assert UNKNOWN not in info["input"]["required"]["lora_1"][1]["options"]
