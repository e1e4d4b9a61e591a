"""Copies of base weights: ComfyUI sees them, gets them back first, and pictures stay the same to the bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from tests.comfy.graph import FluxGraph
from tests.comfy.models import DEV
from tests.comfy.pack import ON_CPU, TOLERANCE, compiled
from tests.comfy.server import Server
from tests.comfy.tensors import relative_error

pytestmark = pytest.mark.comfy

A, B = "a.safetensors", "b.safetensors"
ITEM_BYTES = 4 if ON_CPU else 2
COPIES_OF_A = ITEM_BYTES * sum(rows * columns for rows, columns in DEV.block_linears().values())
"""a.safetensors changes every linear layer of the blocks."""

Loras = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Held:
    """What ComfyUI was told about the bound weights: `size` and `loaded` bytes, and what is left `after` it asked."""

    size: int
    loaded: int
    after: int
    kept: bool


def run(
    server: Server, loras: Loras = (), *, free_bytes: int = 0, at_load: bool = False, other_block: int | None = None,
    **options: str,
) -> tuple[torch.Tensor, Held]:  # fmt: skip
    """The latent of a compiled run. `free_bytes` are asked for after sampling, while the model is still in use."""
    graph = FluxGraph()
    model = compiled(graph, graph.unet(), **options)
    for lora in loras:
        model = graph.lora(model, *lora)
    if other_block is not None:
        model = graph.add("Test_OtherWeights", model=model, index=other_block)
    samples = graph.sample(model, graph.text())
    held = graph.add("Test_FreeBound", samples=samples, free_bytes=free_bytes, at_load=at_load)
    path = server.scratch / f"memory_{graph.nonce}.safetensors"
    graph.add("Test_SaveLatent", samples=held, path=str(path))
    said = json.loads(server.submit(graph).ui(held)["text"][0])
    return load_file(path)["samples"], Held(**said)


def stock(server: Server, loras: Loras = ()) -> torch.Tensor:
    graph = FluxGraph()
    model = graph.unet()
    for lora in loras:
        model = graph.lora(model, *lora)
    return server.latent(graph, graph.sample(model, graph.text()))


def test_comfyui_sees_copies_of_base_weights(server: Server) -> None:
    server.free()
    bound = run(server, base_weights="gpu")[1]
    with_lora = run(server, [(A, 1.0)], base_weights="gpu")[1]
    without = run(server, base_weights="gpu")[1]
    assert bound.size == bound.loaded > COPIES_OF_A
    assert with_lora.size == with_lora.loaded == bound.size + COPIES_OF_A
    assert without == bound


@pytest.mark.skipif(not ON_CPU, reason="on a GPU, auto keeps copies where there is room")
@pytest.mark.parametrize("where", ["auto", "host"])
def test_on_a_cpu_no_copies_are_kept(server: Server, where: str) -> None:
    server.free()
    bound = run(server, base_weights=where)[1]
    latent, with_lora = run(server, [(A, 1.0)], base_weights=where)
    assert with_lora == bound
    assert torch.equal(latent, run(server, [(A, 1.0)], base_weights="gpu")[0])


def test_copies_go_first_and_are_read_again(server: Server) -> None:
    server.free()
    reference = run(server, [(B, 0.6)], base_weights="gpu")[0]
    _, held = run(server, [(A, 1.0)], base_weights="gpu", free_bytes=COPIES_OF_A)
    assert held.kept
    assert held.after == held.loaded - COPIES_OF_A
    latent, later = run(server, [(B, 0.6)], base_weights="gpu")
    assert torch.equal(latent, reference)
    assert relative_error(latent, stock(server, [(B, 0.6)])) < TOLERANCE
    assert later.loaded < held.loaded, "b.safetensors touches fewer layers"


def test_only_as_many_copies_go_as_are_asked_for(server: Server) -> None:
    server.free()
    _, held = run(server, [(A, 1.0)], base_weights="gpu", free_bytes=1)
    assert held.kept
    assert 0 < held.loaded - held.after < COPIES_OF_A // 4


def test_copies_make_room_for_what_the_next_run_needs(server: Server) -> None:
    server.free()
    _, held = run(server, [(A, 1.0)], base_weights="gpu", free_bytes=COPIES_OF_A // 2, at_load=True)
    assert COPIES_OF_A // 2 <= held.loaded - held.after < COPIES_OF_A
    _, more = run(server, [(A, 0.5)], base_weights="gpu", free_bytes=10 * held.size, at_load=True)
    assert more.after == held.size - COPIES_OF_A, "the weights themselves stay bound"
    assert relative_error(run(server, [(B, 1.0)])[0], stock(server, [(B, 1.0)])) < TOLERANCE


def test_after_every_eviction_a_b_a_none_has_the_same_bits(server: Server) -> None:
    switches: list[Loras] = [[(A, 1.0)], [(B, 1.0)], [(A, 1.0)], []]
    fresh = []
    for loras in switches:
        server.free()
        fresh.append(run(server, loras, base_weights="gpu")[0])
    for _ in range(3):
        for loras, reference in zip(switches, fresh, strict=True):
            latent, held = run(server, loras, base_weights="gpu", free_bytes=COPIES_OF_A // 5)
            assert held.kept == bool(loras), "without copies there is nothing to give back but all of it"
            assert torch.equal(latent, reference)


def test_more_than_the_copies_takes_everything_and_the_next_run_binds_anew(server: Server) -> None:
    server.free()
    first, held = run(server, [(A, 1.0)], base_weights="gpu", free_bytes=COPIES_OF_A + 1)
    assert not held.kept
    assert held.after == 0
    again, bound = run(server, [(A, 1.0)], base_weights="gpu")
    assert torch.equal(again, first)
    assert bound.loaded == held.loaded


def test_a_base_is_read_from_the_model_and_not_from_another_packs_block(server: Server) -> None:
    """The block's LoRA goes while the other one is in its place."""
    server.free()
    reference = run(server)[0]
    run(server, [(A, 1.0)])
    other, _ = run(server, [(A, 1.0)], other_block=1)
    assert relative_error(other, reference) > 0.01
    assert torch.equal(run(server)[0], reference)
