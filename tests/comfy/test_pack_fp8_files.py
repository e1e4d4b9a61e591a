"""FP8 checkpoints: bound as they are, and written by Save FP8 Model."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.comfy.fp8 import LEAST, MOST, fp8
from tests.comfy.graph import FluxGraph, Link
from tests.comfy.pack import TOLERANCE, Said, compiled, run
from tests.comfy.process import ServerProcess
from tests.comfy.server import NodeError, Server
from tests.comfy.tensors import relative_error

pytestmark = pytest.mark.comfy

FILES = pytest.mark.parametrize(
    ("unet", "weight_dtype"), [("flux_fp8.safetensors", "default"), ("flux_dev.safetensors", "fp8_e4m3fn")]
)
BLOCKS = [(kind, index) for kind in ("double_block", "single_block") for index in range(2)]


def stock(server: Server, unet: str, weight_dtype: str = "default", lora: str | None = None) -> torch.Tensor:
    graph = FluxGraph()
    model = graph.unet(unet, weight_dtype)
    return server.latent(graph, graph.sample(model if lora is None else graph.lora(model, lora), graph.text()))


def ours(
    server: Server, unet: str, weight_dtype: str = "default", lora: str | None = None, eager: bool = False
) -> tuple[torch.Tensor, Said]:
    """Compiled; with `eager`, every block runs through ComfyUI's code on the bound weights."""
    graph = FluxGraph()
    node = model = compiled(graph, graph.unet(unet, weight_dtype))
    for kind, index in BLOCKS if eager else ():
        model = graph.add("Test_ReplaceBlock", model=model, kind=kind, index=index, replacement="original")
    model = model if lora is None else graph.lora(model, lora)
    return run(server, graph, graph.sample(model, graph.text()), node)


@FILES
def test_bound_as_they_are(server: Server, unet: str, weight_dtype: str) -> None:
    """Read back by ComfyUI's own blocks, the bound weights give ComfyUI's own picture."""
    latent, said = ours(server, unet, weight_dtype, eager=True)
    assert said.compiled == 0
    assert relative_error(latent, stock(server, unet, weight_dtype)) < TOLERANCE


@FILES
def test_compiled(server: Server, unet: str, weight_dtype: str) -> None:
    """FP8 products: what goes into them is rounded too, where ComfyUI on a CPU multiplies in fp32."""
    latent, said = ours(server, unet, weight_dtype)
    assert said.compiled == 4
    assert "26 layers in FP8 as in the file" in said.text
    assert LEAST < relative_error(latent, stock(server, unet, weight_dtype)) < MOST


@FILES
def test_loras_switch_and_leave_the_bits_as_they_were(server: Server, unet: str, weight_dtype: str) -> None:
    first = {lora: ours(server, unet, weight_dtype, lora)[0] for lora in ("a.safetensors", "b.safetensors", None)}
    for lora in ("a.safetensors", None):
        latent, _ = ours(server, unet, weight_dtype, lora)
        assert torch.equal(latent, first[lora])
    with_lora = stock(server, "flux_dev.safetensors", lora="a.safetensors")
    assert relative_error(first["a.safetensors"], with_lora) < MOST
    assert relative_error(first[None], with_lora) > MOST


def save(graph: FluxGraph, model: Link, filename: str, overwrite: bool = False) -> Link:
    return graph.add("TRT_SaveFp8Model", model=model, filename=filename, overwrite=overwrite)


def saved(server: Server, lora: str | None = None, **options: object) -> tuple[str, str, torch.Tensor]:
    """A new file's name, what the node said, and the picture of FP8 Quantize alone (with the LoRA before it)."""
    graph, name = FluxGraph(), f"saved/{uuid.uuid4().hex}"
    unet = graph.unet() if lora is None else graph.lora(graph.unet(), lora)
    if options.get("activations") == "static":
        options |= {"conditioning": graph.text(seed=4), "latent": graph.empty_latent()}
    model = fp8(graph, unet, **options)
    node = save(graph, model, name)
    latent = graph.sample(model, graph.text())
    path = server.scratch / f"{uuid.uuid4().hex}.safetensors"
    graph.add("Test_SaveLatent", samples=latent, path=str(path))
    text = server.submit(graph).ui(node)["text"][0]
    with safe_open(path, framework="pt") as file:
        return f"{name}.safetensors", text, file.get_tensor("samples")


OPTIONS = {
    "dynamic": {},
    "static": {"activations": "static"},
    "excluded": {"exclude": "single_blocks.*.linear2", "granularity": "per tensor"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_saved_and_loaded_again(server: Server, server_process: ServerProcess, options: str) -> None:
    """By ComfyUI's own loader, as a scaled FP8 model, with the picture of FP8 Quantize alone."""
    name, text, alone = saved(server, **OPTIONS[options])
    layers = 24 if options == "excluded" else 26
    assert f"{layers} layers in FP8" in text
    assert relative_error(stock(server, name), alone) < 1e-6
    path = server_process.models / "diffusion_models" / name
    assert path.stat().st_size < 0.5 * 33.79e6
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("double_blocks.0.img_attn.qkv.weight").dtype is torch.float8_e4m3fn
        assert ("double_blocks.0.img_attn.qkv.input_scale" in file.keys()) is (options == "static")  # noqa: SIM118
        excluded = file.get_tensor("single_blocks.0.linear2.weight").dtype
        assert (excluded is torch.float8_e4m3fn) is (options != "excluded")
    latent, said = ours(server, name)
    assert said.compiled == 4
    assert f"{layers} layers in FP8 as in the file" in said.text
    assert (options == "static") is ("fp8 per tensor, static" in said.text)
    assert relative_error(latent, stock(server, "flux_dev.safetensors")) < MOST


def test_loras_are_merged_into_the_file(server: Server) -> None:
    name, text, _ = saved(server, lora="a.safetensors")
    assert "LoRAs merged into 26 weights" in text
    exact = stock(server, "flux_dev.safetensors", lora="a.safetensors")
    assert LEAST < relative_error(stock(server, name), exact) < MOST


def failure(server: Server, graph: FluxGraph) -> str:
    with pytest.raises(NodeError) as caught:
        server.submit(graph)
    assert caught.value.message.startswith("Save FP8 Model: ")
    return caught.value.message


def test_a_file_that_is_there_stays(server: Server, server_process: ServerProcess) -> None:
    path = server_process.models / "diffusion_models" / "there.safetensors"
    path.write_bytes(b"mine")
    graph = FluxGraph()
    save(graph, fp8(graph, graph.unet()), "there")
    message = failure(server, graph)
    assert "exists already" in message
    assert '"filename"' in message
    assert path.read_bytes() == b"mine"
    graph = FluxGraph()
    save(graph, fp8(graph, graph.unet()), "there", overwrite=True)
    server.submit(graph)
    assert path.stat().st_size > 10**7


@pytest.mark.parametrize("name", ["", "../out", "/etc/passwd", "a/../../b", ".hidden", "a:b", "a//b", "..\\out"])
def test_names_that_lead_elsewhere(server: Server, name: str) -> None:
    graph = FluxGraph()
    save(graph, fp8(graph, graph.unet()), name)
    assert "is no file name" in failure(server, graph)


def test_a_model_without_a_recipe(server: Server) -> None:
    graph = FluxGraph()
    save(graph, graph.unet(), "never")
    assert "Put FP8 Quantize between" in failure(server, graph)


def test_a_folder_that_is_a_file(server: Server, server_process: ServerProcess) -> None:
    (server_process.models / "diffusion_models" / "taken").write_bytes(b"")
    graph = FluxGraph()
    save(graph, fp8(graph, graph.unet()), "taken/model")
    assert "cannot be written" in failure(server, graph)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


def test_nothing_is_left_behind(server: Server, server_process: ServerProcess) -> None:
    folder = server_process.models / "diffusion_models"
    saved(server)
    assert leftovers(folder) == []
