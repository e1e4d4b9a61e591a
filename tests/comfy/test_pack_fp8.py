"""FP8 Quantize in a real graph: compiled, on its own, with LoRAs, beside a branch in full precision."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.comfy.checkpoint import write_lora_kohya
from tests.comfy.fp8 import LEAST, MOST, fp8
from tests.comfy.graph import FluxGraph, Link
from tests.comfy.models import DEV
from tests.comfy.pack import TOLERANCE, compiled, run
from tests.comfy.process import ServerProcess
from tests.comfy.server import NodeError, Server
from tests.comfy.tensors import relative_error

pytestmark = pytest.mark.comfy

CORRECTED = "takes the mean error of rounded weights out of biases"


def reference(server: Server, lora: str | None = None) -> torch.Tensor:
    graph = FluxGraph()
    model = graph.unet() if lora is None else graph.lora(graph.unet(), lora)
    return server.latent(graph, graph.sample(model, graph.text()))


def in_fp8(error: float) -> bool:
    return LEAST < error < MOST


@pytest.mark.parametrize("granularity", ["per row", "per tensor"])
def test_compiled(server: Server, granularity: str) -> None:
    graph = FluxGraph()
    node = compiled(graph, fp8(graph, graph.unet(), granularity=granularity))
    latent, said = run(server, graph, graph.sample(node, graph.text()), node)
    assert said.compiled == 4
    assert in_fp8(relative_error(latent, reference(server)))


def test_on_its_own(server: Server) -> None:
    graph = FluxGraph()
    node = fp8(graph, graph.unet())
    latent, said = run(server, graph, graph.sample(node, graph.text()), node)
    assert "ComfyUI's own FP8" in said.text
    assert "error of the weights: 2." in said.text
    assert "33.79 MB before, 13.73 MB after" in said.text
    assert in_fp8(relative_error(latent, reference(server)))


ORDERS = {
    "before": lambda g, q, end: end(q(g.lora(g.unet(), "a.safetensors"))),
    "between": lambda g, q, end: end(g.lora(q(g.unet()), "a.safetensors")),
    "after": lambda g, q, end: g.lora(end(q(g.unet())), "a.safetensors"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_lora_compiled(server: Server, order: str) -> None:
    """Closer to full precision with the LoRA than FP8 alone is to the LoRA's effect, in any order."""
    graph, nodes = FluxGraph(), []

    def end(model: Link) -> Link:
        nodes.append(compiled(graph, model))
        return nodes[-1]

    model = ORDERS[order](graph, lambda model: fp8(graph, model), end)
    latent, said = run(server, graph, graph.sample(model, graph.text()), nodes[0])
    assert said.compiled == 4
    assert in_fp8(relative_error(latent, reference(server, "a.safetensors")))
    assert relative_error(latent, reference(server)) > 2 * relative_error(latent, reference(server, "a.safetensors"))


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_its_own(server: Server, order: str) -> None:
    graph = FluxGraph()
    model = ORDERS[order](graph, lambda model: fp8(graph, model), lambda model: model)
    latent = server.latent(graph, graph.sample(model, graph.text()))
    assert in_fp8(relative_error(latent, reference(server, "a.safetensors")))


def test_switching_loras_ends_where_it_began(server: Server) -> None:
    def picture(lora: str | None) -> torch.Tensor:
        graph = FluxGraph()
        model = compiled(graph, fp8(graph, graph.unet()))
        model = model if lora is None else graph.lora(model, lora)
        return server.latent(graph, graph.sample(model, graph.text()))

    first = {lora: picture(lora) for lora in ("a.safetensors", "b.safetensors", None)}
    for lora in ("b.safetensors", "a.safetensors", None, "a.safetensors"):
        assert torch.equal(picture(lora), first[lora])


def test_a_lora_on_modulations_alone_arrives_whole_and_leaves_no_trace(
    server: Server, server_process: ServerProcess
) -> None:
    """Beside the stored matrix: merged into its integers, 1.12 of a strength of 0.1 arrived."""
    name = "modulations.safetensors"
    write_lora_kohya(server_process.models / "loras" / name, DEV, seed=5, only=r"mod")

    def picture(strength: float, *, in_fp8: bool) -> torch.Tensor:
        graph = FluxGraph()
        model = compiled(graph, fp8(graph, graph.unet())) if in_fp8 else graph.unet()
        model = graph.lora(model, name, strength) if strength else model
        return server.latent(graph, graph.sample(model, graph.text()))

    base, plain = picture(0, in_fp8=True), picture(0, in_fp8=False)
    for strength in (1.0, 0.1):
        seen, exact = picture(strength, in_fp8=True) - base, picture(strength, in_fp8=False) - plain
        assert float((seen * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.05)
        assert torch.equal(picture(0, in_fp8=True), base)


@pytest.mark.parametrize("compile_", [True, False])
def test_a_second_branch_stays_in_full_precision(server: Server, compile_: bool) -> None:
    """One loader, both branches in one run, before and after each other."""
    exact = reference(server)
    graph = FluxGraph()
    unet, text = graph.unet(), graph.text()
    plain = graph.sample(unet, text)
    quantized = fp8(graph, unet)
    eighth = graph.sample(compiled(graph, quantized) if compile_ else quantized, text)
    again = graph.sample(compiled(graph, unet) if compile_ else unet, text, latent=graph.empty_latent())
    paths = [server.scratch / f"branch_{index}.safetensors" for index in range(2)]
    for latent, path in zip((plain, again), paths, strict=True):
        graph.add("Test_SaveLatent", samples=latent, path=str(path))
    assert in_fp8(relative_error(server.latent(graph, eighth), exact))
    for path in paths:
        assert relative_error(load_file(path)["samples"], exact) < TOLERANCE


@pytest.mark.parametrize("compile_", [True, False])
def test_static_activations(server: Server, compile_: bool) -> None:
    graph = FluxGraph()
    node = fp8(
        graph, graph.unet(), activations="static", conditioning=graph.text(seed=4), latent=graph.empty_latent()
    )  # fmt: skip
    model = compiled(graph, node) if compile_ else node
    latent, said = run(server, graph, graph.sample(model, graph.text()), node)
    assert in_fp8(relative_error(latent, reference(server)))
    assert "error of layers' outputs" in said.text
    assert CORRECTED in said.text


@pytest.mark.parametrize("compile_", [True, False])
def test_dynamic_activations_with_conditioning(server: Server, compile_: bool) -> None:
    """A picture is sampled for mean inputs, and no range is made of it."""
    graph = FluxGraph()
    node = fp8(graph, graph.unet(), conditioning=graph.text(seed=4), latent=graph.empty_latent())
    model = compiled(graph, node) if compile_ else node
    latent, said = run(server, graph, graph.sample(model, graph.text()), node)
    assert in_fp8(relative_error(latent, reference(server)))
    assert "dynamic activations" in said.text
    assert CORRECTED in said.text
    assert "error of layers' outputs" in said.text


def test_dynamic_activations_without_conditioning_sample_nothing(server: Server) -> None:
    graph = FluxGraph()
    node = fp8(graph, graph.unet())
    _, said = run(server, graph, graph.sample(node, graph.text()), node)
    assert CORRECTED not in said.text
    assert "error of layers' outputs" not in said.text


@pytest.mark.parametrize(("strength", "warned"), [(1.0, False), (60.0, True)])
def test_a_lora_beyond_the_static_ranges_is_said(server: Server, strength: float, warned: bool) -> None:
    graph = FluxGraph()
    node = compiled(graph, fp8(
        graph, graph.unet(), activations="static", conditioning=graph.text(seed=4), latent=graph.empty_latent()
    ))  # fmt: skip
    model = graph.lora(node, "a.safetensors", strength)
    _, said = run(server, graph, graph.sample(model, graph.text()), node)
    assert said.compiled == 4
    assert ("Warning: static FP8 scales cut off inputs of " in said.text) is warned
    assert ("times its range" in said.text) is warned


@pytest.mark.parametrize("compile_", [True, False])
def test_excluded_layers(server: Server, compile_: bool) -> None:
    """Nearer to full precision the fewer layers are in FP8, and named on the node."""
    errors = []
    for exclude in ("", "double_blocks.*\nsingle_blocks.0.*"):
        graph = FluxGraph()
        node = fp8(graph, graph.unet(), exclude=exclude)
        model = compiled(graph, node) if compile_ else node
        latent, said = run(server, graph, graph.sample(model, graph.text()), node)
        errors.append(relative_error(latent, reference(server)))
    assert "not in FP8: double_blocks.*.img_mod.lin (2)" in said.text
    assert 0 < errors[1] < 0.8 * errors[0]


def test_a_replaced_block_gets_readable_weights(server: Server) -> None:
    """ComfyUI's own block runs on what is bound: the FP8 weights in the compute dtype, LoRA merged."""
    graph = FluxGraph()
    node = compiled(graph, fp8(graph, graph.lora(graph.unet(), "a.safetensors")))
    model = graph.add("Test_ReplaceBlock", model=node, kind="double_block", index=1, replacement="original")
    latent, said = run(server, graph, graph.sample(model, graph.text()), node)
    assert said.compiled == 3
    assert in_fp8(relative_error(latent, reference(server, "a.safetensors")))


def failure(server: Server, graph: FluxGraph, model: Link) -> str:
    with pytest.raises(NodeError) as caught:
        server.latent(graph, graph.sample(model, graph.text()))
    assert caught.value.message.startswith("FP8 Quantize: ")
    return caught.value.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": "single_blocks.*.linear3"}, ["matches no layer", "single_blocks.0.linear", '"exclude"']),
        ({"exclude": "*"}, ["leave no layer", '"exclude"']),
        ({"activations": "static"}, ["no conditioning is connected", "dynamic", '"conditioning"']),
    ],
)
def test_options_that_cannot_be(server: Server, options: dict[str, str], words: list[str]) -> None:
    graph = FluxGraph()
    message = failure(server, graph, fp8(graph, graph.unet(), **options))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("unet", "weight_dtype"), [("flux_fp8.safetensors", "default"), ("flux_dev.safetensors", "fp8_e4m3fn")]
)
def test_a_model_that_is_quantized_already(server: Server, unet: str, weight_dtype: str) -> None:
    graph = FluxGraph()
    message = failure(server, graph, fp8(graph, graph.unet(unet, weight_dtype)))
    assert "quantized already" in message
    assert "as it is" in message


def test_two_of_them(server: Server) -> None:
    graph = FluxGraph()
    assert "another FP8 Quantize" in failure(server, graph, fp8(graph, fp8(graph, graph.unet())))
