"""LoRA nodes around TRT Compile Transformer: the same pictures as ComfyUI's, and no more work than the change needs.

Work is counted in layers and builds, which the node says; time is never asserted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.comfy.graph import FluxGraph, Link
from tests.comfy.models import DEV
from tests.comfy.pack import TOLERANCE, Said, compiled, run
from tests.comfy.server import Server
from tests.comfy.tensors import differs, relative_error

pytestmark = pytest.mark.comfy

A, B = "a.safetensors", "b.safetensors"
A_LAYERS = len(DEV.block_linears())
"""a.safetensors changes every linear layer of the blocks."""
B_LAYERS = 4 * DEV.double_blocks + DEV.single_blocks
"""b.safetensors changes attention: q, k, v and projection of both streams, and q, k, v of single blocks."""

Loras = Sequence[tuple[str, float]]


def graph_with(
    before: Loras = (), after: Loras = (), unet: str = "flux_dev.safetensors", node: bool = True
) -> tuple[FluxGraph, Link, Link]:
    """The graph, its latent and our node (or the loader, without `node`)."""
    graph = FluxGraph()
    model = ours = graph.unet(unet)
    for lora in before:
        model = graph.lora(model, *lora)
    if node:
        model = ours = compiled(graph, model)
    for lora in after:
        model = graph.lora(model, *lora)
    return graph, graph.sample(model, graph.text()), ours


def stock(server: Server, *loras: tuple[str, float], unet: str = "flux_dev.safetensors") -> torch.Tensor:
    graph, latent, _ = graph_with(loras, unet=unet, node=False)
    return server.latent(graph, latent)


def ours(server: Server, before: Loras = (), after: Loras = (), **options: str) -> tuple[torch.Tensor, Said]:
    graph, latent, node = graph_with(before, after, **options)
    return run(server, graph, latent, node)


def assert_like(latent: torch.Tensor, reference: torch.Tensor) -> None:
    assert relative_error(latent, reference) < TOLERANCE


CASES: dict[str, tuple[Loras, Loras]] = {
    "before": ([(A, 1.0)], []),
    "after": ([], [(A, 1.0)]),
    "diffusers names before": ([(B, 1.0)], []),
    "diffusers names after": ([], [(B, 1.0)]),
    "strength": ([], [(A, 0.37)]),
    "negative": ([(A, -1.0)], []),
    "stacked before": ([(A, 1.0), (B, 0.7)], []),
    "stacked after": ([], [(A, 1.0), (B, 0.7)]),
    "one before, one after": ([(A, 0.5)], [(B, 0.7)]),
    "the same twice": ([(A, 0.5)], [(A, 0.5)]),
    "strength 0": ([], [(A, 0.0)]),
}


@pytest.mark.parametrize(("before", "after"), CASES.values(), ids=CASES.keys())
def test_loras_around_the_node(server: Server, before: Loras, after: Loras) -> None:
    latent, said = ours(server, before, after)
    assert_like(latent, stock(server, *before, *after))
    assert said.compiled == 4


@pytest.mark.parametrize("place", ["before", "after"])
def test_switching_touches_only_the_loras_layers_and_builds_nothing(server: Server, place: str) -> None:
    def switch(*loras: tuple[str, float]) -> Said:
        return ours(server, **{place: loras})[1]

    server.free()
    assert (first := switch()).touched == 0
    expected = [
        ([(B, 1.0)], B_LAYERS),
        ([(B, 1.0)], 0),
        ([(B, 0.5)], B_LAYERS),
        ([(B, 0.5), (A, 1.0)], A_LAYERS),
        ([(A, 1.0)], B_LAYERS),
        ([], A_LAYERS),
        ([], 0),
    ]
    for loras, layers in expected:
        said = switch(*loras)
        assert (said.touched, said.builds) == (layers, first.builds), loras


def test_a_b_a_none_is_stable_to_the_bit(server: Server) -> None:
    switches: list[Loras] = [[(A, 1.0)], [(B, 1.0)], [(A, 1.0)], []]
    fresh = []
    for loras in switches:
        server.free()
        latent, said = ours(server, after=loras)
        assert said.builds == 1
        assert_like(latent, stock(server, *loras))
        fresh.append(latent)
    assert torch.equal(fresh[0], fresh[2])
    for _ in range(20):
        for loras, reference in zip(switches, fresh, strict=True):
            assert torch.equal(ours(server, after=loras)[0], reference)


def test_before_and_after_give_the_same_bits(server: Server) -> None:
    assert torch.equal(ours(server, before=[(A, 0.8)])[0], ours(server, after=[(A, 0.8)])[0])


def test_stock_runs_between_ours_are_undisturbed(server: Server) -> None:
    """Both share one loaded model: neither may see the other's merged weights."""
    plain, changed = stock(server), stock(server, (A, 1.0))
    for _ in range(2):
        assert_like(ours(server, after=[(A, 1.0)])[0], changed)
        assert torch.equal(stock(server), plain)
        assert_like(ours(server)[0], plain)
        assert torch.equal(stock(server, (A, 1.0)), changed)
        assert_like(ours(server, before=[(B, 1.0)])[0], stock(server, (B, 1.0)))


def test_lora_on_scaled_fp8(server: Server) -> None:
    """Both round the merged weight to FP8 again, each in its own way, and we round what is multiplied with it."""
    latent, said = ours(server, after=[(A, 1.0)], unet="flux_fp8.safetensors")
    reference = stock(server, (A, 1.0), unet="flux_fp8.safetensors")
    base = stock(server, unet="flux_fp8.safetensors")
    assert relative_error(latent, reference) < 0.3 * relative_error(base, reference)
    assert said.touched == A_LAYERS
    restored, _ = ours(server, unet="flux_fp8.safetensors")
    assert relative_error(restored, base) < 0.3 * relative_error(base, reference)


def bypass(graph: FluxGraph, model: Link) -> Link:
    return graph.add("LoraLoaderBypassModelOnly", model=model, lora_name=B, strength_model=1.0)


@pytest.mark.parametrize("place", ["before", "after"])
def test_bypass_loras_run_through_comfyuis_blocks(server: Server, place: str) -> None:
    def sampled(node: bool) -> tuple[torch.Tensor, Said | None]:
        graph = FluxGraph()
        model = graph.unet()
        model = bypass(graph, model) if place == "before" else model
        our_node = compiled(graph, model) if node else model
        model = bypass(graph, our_node) if place == "after" else our_node
        model = graph.lora(model, A)
        latent = graph.sample(model, graph.text())
        return run(server, graph, latent, our_node) if node else (server.latent(graph, latent), None)

    latent, said = sampled(node=True)
    assert_like(latent, sampled(node=False)[0])
    assert said is not None
    assert said.compiled == 2  # ComfyUI's bypass does not reach q, k and v of single blocks
    assert "changed the forward of a Linear" in said.text


def test_hook_loras_run_eagerly_and_are_said(server: Server) -> None:
    def sampled(node: bool) -> tuple[torch.Tensor, Said | None]:
        graph = FluxGraph()
        model = graph.lora(graph.unet(), B)
        model = compiled(graph, model) if node else model
        hooks = graph.add("CreateHookLoraModelOnly", lora_name=A, strength_model=1.0)
        text = graph.add(
            "ConditioningSetProperties", cond_NEW=graph.text(), strength=1.0, set_cond_area="default", hooks=hooks
        )
        latent = graph.sample(model, text)
        return run(server, graph, latent, model) if node else (server.latent(graph, latent), None)

    latent, said = sampled(node=True)
    assert torch.equal(latent, sampled(node=False)[0])
    assert said is not None
    assert "Not compiled, ComfyUI runs it: the conditioning has LoRA hooks" in said.text
    assert_like(ours(server)[0], stock(server))


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_control_lora_that_widens_the_input(server: Server, place: str) -> None:
    def sampled(node: bool) -> torch.Tensor:
        loras = [("control.safetensors", 1.0)]
        graph = FluxGraph()
        model = graph.unet()
        for step in ("before", "node", "after"):
            if step == place:
                model = graph.lora(model, *loras[0])
            if step == "node" and node:
                model = compiled(graph, model)
        text = graph.add("Test_FillConditioning", conditioning=graph.text(), latent=graph.picture())
        return server.latent(graph, graph.sample(model, text))

    assert_like(sampled(node=True), sampled(node=False))
    assert_like(ours(server)[0], stock(server))


def test_comfyuis_own_blocks_do_not_run(server: Server, tmp_path: Path) -> None:
    graph, path = FluxGraph(), tmp_path / "events.jsonl"
    model = graph.add("Test_Spy", model=graph.lora(graph.unet(), A), path=str(path))
    server.latent(graph, graph.sample(compiled(graph, model), graph.text(), steps=2))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["blocks"] for event in events if event["event"] == "diffusion_model"] == [{}, {}]


def test_other_models_at_the_same_time(server: Server) -> None:
    references = [stock(server), stock(server, unet="flux_dev_2.safetensors")]
    assert differs(*references)
    for _ in range(2):
        assert_like(ours(server)[0], references[0])
        assert_like(ours(server, unet="flux_dev_2.safetensors")[0], references[1])


def test_changes_around_the_blocks_are_comfyuis_and_switch_too(server: Server) -> None:
    """A merge and a control LoRA change what lies around the blocks as well: ComfyUI patches that itself."""

    def merged(ratio: float | None, node: bool) -> torch.Tensor:
        graph = FluxGraph()
        model = graph.unet()
        if ratio is not None:
            other = graph.unet("flux_dev_2.safetensors")
            model = graph.add("ModelMergeSimple", model1=model, model2=other, ratio=ratio)
        model = compiled(graph, model) if node else model
        return server.latent(graph, graph.sample(model, graph.text()))

    def controlled(strength: float, node: bool) -> torch.Tensor:
        graph = FluxGraph()
        model = compiled(graph, graph.unet()) if node else graph.unet()
        model = graph.lora(model, "control.safetensors", strength)
        text = graph.add("Test_FillConditioning", conditioning=graph.text(), latent=graph.picture())
        return server.latent(graph, graph.sample(model, text))

    ratios, strengths = (0.5, 0.8, None, 0.5), (1.0, 0.5, 1.0)
    references = [merged(ratio, node=False) for ratio in ratios] + [controlled(s, node=False) for s in strengths]
    latents = [merged(ratio, node=True) for ratio in ratios] + [controlled(s, node=True) for s in strengths]
    for latent, reference in zip(latents, references, strict=True):
        assert_like(latent, reference)
    assert differs(references[0], references[1])
    assert differs(references[4], references[5])
