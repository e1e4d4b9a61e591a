"""The test nodes do to FLUX what real packs do: each has an effect, and none at its neutral setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.comfy.graph import FluxGraph, Link
from tests.comfy.server import Server
from tests.comfy.tensors import differs

pytestmark = pytest.mark.comfy

BLOCKS = [("double_block", 1), ("single_block", 0)]
PATCHES = [
    "post_input",
    "attn1_patch",
    "attn1_output_patch",
    "attention_override",
    "model_function_wrapper",
    "diffusion_model_wrapper",
]


@pytest.fixture(scope="module")
def plain(server: Server) -> torch.Tensor:
    graph = FluxGraph()
    return server.latent(graph, graph.sample(graph.unet(), graph.text()))


def controlled(server: Server, *, reference: bool = False, cfg: float = 1.0, **options: object) -> torch.Tensor:
    graph = FluxGraph()
    text = graph.text()
    if reference:
        text = graph.add("ReferenceLatent", conditioning=text, latent=graph.picture(width=128, height=128))
    settings = {"seed": 1, "strength": 1.0, "blocks": "both", "stride": 1, "end_percent": 1.0, **options}
    positive = graph.add("Test_Control", conditioning=text, **settings)
    return server.latent(graph, graph.sample(graph.unet(), positive, negative=text, cfg=cfg))


@pytest.mark.parametrize(
    "change",
    [{}, {"blocks": "double"}, {"blocks": "single"}, {"stride": 2}, {"strength": 0.5}, {"end_percent": 0.5}],
    ids=str,
)
def test_control_residuals_change_the_picture(server: Server, plain: torch.Tensor, change: dict) -> None:
    latent = controlled(server, **change)
    assert differs(latent, plain)
    assert not change or differs(latent, controlled(server))


def test_control_of_no_strength_changes_nothing(server: Server, plain: torch.Tensor) -> None:
    assert torch.equal(controlled(server, strength=0.0), plain)


def test_control_works_beside_references_and_cfg(server: Server) -> None:
    for options in ({"reference": True}, {"cfg": 3.0}):
        assert differs(controlled(server, **options), controlled(server, strength=0.0, **options))


def test_two_controls_add_up(server: Server) -> None:
    graph = FluxGraph()
    text = graph.text()
    for seed in (1, 2):
        text = graph.add(
            "Test_Control",
            conditioning=text,
            seed=seed,
            strength=1.0,
            blocks="both",
            stride=seed,
            end_percent=1.0,
        )
    assert differs(server.latent(graph, graph.sample(graph.unet(), text)), controlled(server))


@pytest.mark.parametrize(("width", "height"), [(256, 256), (264, 248)])
def test_an_attention_mask_changes_the_picture(server: Server, width: int, height: int) -> None:
    def masked(bias: float) -> torch.Tensor:
        graph = FluxGraph()
        text = graph.add("Test_AttentionMask", conditioning=graph.text(), tokens=8, bias=bias)
        latent = graph.picture(width=width, height=height)
        return server.latent(graph, graph.sample(graph.unet(), text, latent=latent))

    assert differs(masked(-4.0), masked(0.0))


@pytest.mark.parametrize(("kind", "index"), BLOCKS)
def test_a_replaced_block_runs_in_place_of_the_original(
    server: Server, plain: torch.Tensor, kind: str, index: int
) -> None:
    def replaced(replacement: str) -> torch.Tensor:
        graph = FluxGraph()
        model = graph.add("Test_ReplaceBlock", model=graph.unet(), kind=kind, index=index, replacement=replacement)
        return server.latent(graph, graph.sample(model, graph.text()))

    assert torch.equal(replaced("original"), plain)
    half, skip = replaced("half"), replaced("skip")
    assert differs(half, plain)
    assert differs(skip, plain)
    assert differs(half, skip)


@pytest.mark.parametrize("kind", PATCHES)
def test_a_patch_changes_the_picture(server: Server, plain: torch.Tensor, kind: str) -> None:
    def patched(factor: float) -> torch.Tensor:
        graph = FluxGraph()
        model = graph.add("Test_Patch", model=graph.unet(), kind=kind, factor=factor)
        return server.latent(graph, graph.sample(model, graph.text()))

    assert torch.equal(patched(1.0), plain)
    assert differs(patched(0.8), plain)


def spied(server: Server, tmp_path: Path, change: str | None = None) -> list[dict]:
    """What the spy saw in one run of two steps, with one block replaced or not."""
    graph, path = FluxGraph(), tmp_path / "events.jsonl"
    model: Link = graph.unet()
    if change is not None:
        model = graph.add("Test_ReplaceBlock", model=model, kind="double_block", index=0, replacement=change)
    model = graph.add("Test_Spy", model=model, path=str(path))
    server.latent(graph, graph.sample(model, graph.text(), steps=2))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_spy_sees_what_flux_is_given(server: Server, tmp_path: Path) -> None:
    calls = [event for event in spied(server, tmp_path) if event["event"] == "diffusion_model"]
    assert len(calls) == 2
    x, timestep, context, y, guidance, ref_latents, control, options = calls[0]["args"]
    kind = x.split("[")[0]
    assert (x, timestep, context) == (f"{kind}[1, 16, 32, 32]", "float32[1]", f"{kind}[1, 32, 4096]")
    assert (y, guidance) == (f"{kind}[1, 768]", f"{kind}[1]")
    assert ref_latents is None
    assert control is None
    assert {"sigmas", "cond_or_uncond", "uuids", "wrappers", "callbacks", "sample_sigmas"} <= options.keys()
    assert calls[0]["kwargs"] == {}


def test_spy_counts_the_blocks_that_run(server: Server, tmp_path: Path) -> None:
    every = {"double 0": 1, "double 1": 1, "single 0": 1, "single 1": 1}
    for change, blocks in ((None, every), ("skip", {k: v for k, v in every.items() if k != "double 0"})):
        folder = tmp_path / str(change)
        folder.mkdir()
        calls = [e for e in spied(server, folder, change) if e["event"] == "diffusion_model"]
        assert [call["blocks"] for call in calls] == [blocks, blocks]


def test_spy_sees_the_order_of_callbacks(server: Server, tmp_path: Path) -> None:
    events = [event["event"] for event in spied(server, tmp_path)]
    run = [event for event in events if event in ("on_pre_run", "diffusion_model", "on_cleanup")]
    assert run == ["on_pre_run", "diffusion_model", "diffusion_model", "on_cleanup"]
