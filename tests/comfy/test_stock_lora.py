"""ComfyUI's own LoRA nodes: every switch gives the same bits as a fresh load, and none gives the base's bits.

Compiled runs are held to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from tests.comfy.graph import FluxGraph, Link
from tests.comfy.server import Server
from tests.comfy.tensors import differs

pytestmark = pytest.mark.comfy

A, B = "a.safetensors", "b.safetensors"
Loras = Sequence[tuple[str, float]]


def with_loras(server: Server, *loras: tuple[str, float], unet: str = "flux_dev.safetensors") -> torch.Tensor:
    graph = FluxGraph()
    model = graph.unet(unet)
    for name, strength in loras:
        model = graph.lora(model, name, strength)
    return server.latent(graph, graph.sample(model, graph.text()))


@pytest.fixture(scope="module")
def plain(server: Server) -> torch.Tensor:
    return with_loras(server)


@pytest.mark.parametrize(
    "loras",
    [[(A, 1.0)], [(B, 1.0)], [(A, 0.5)], [(A, -1.0)], [(A, 1.0), (B, 0.7)]],
    ids=["kohya", "diffusers", "half", "negative", "stacked"],
)
def test_a_lora_changes_the_picture_and_its_removal_undoes_it(
    server: Server, plain: torch.Tensor, loras: Loras
) -> None:
    first = with_loras(server, *loras)
    assert first.isfinite().all()
    assert differs(first, plain)
    assert torch.equal(with_loras(server), plain)
    assert torch.equal(with_loras(server, *loras), first)


def test_every_switch_gives_the_bits_of_a_fresh_load(server: Server, plain: torch.Tensor) -> None:
    switches: list[Loras] = [[], [(A, 1.0)], [(B, 1.0)], [(A, 1.0), (B, 1.0)]]
    fresh = []
    for loras in switches:
        server.free()
        fresh.append(with_loras(server, *loras))
    assert torch.equal(fresh[0], plain)
    for _ in range(3):
        for loras, reference in zip(switches, fresh, strict=True):
            assert torch.equal(with_loras(server, *loras), reference)


def test_different_loras_and_strengths_give_different_pictures(server: Server) -> None:
    pictures = [with_loras(server, lora) for lora in [(A, 1.0), (A, 0.5), (B, 1.0)]]
    assert differs(pictures[0], pictures[1])
    assert differs(pictures[0], pictures[2])


def test_strength_zero_is_no_lora(server: Server, plain: torch.Tensor) -> None:
    assert torch.equal(with_loras(server, (A, 0.0)), plain)


def test_a_lora_works_on_scaled_fp8(server: Server) -> None:
    base, changed = (with_loras(server, *loras, unet="flux_fp8.safetensors") for loras in ([], [(A, 1.0)]))
    assert differs(changed, base)
    assert torch.equal(with_loras(server, unet="flux_fp8.safetensors"), base)


def bypass(graph: FluxGraph, model: Link) -> tuple[Link, Link]:
    model = graph.add("LoraLoaderBypassModelOnly", model=model, lora_name=A, strength_model=1.0)
    return model, graph.text()


def hook(graph: FluxGraph, model: Link) -> tuple[Link, Link]:
    hooks = graph.add("CreateHookLoraModelOnly", lora_name=A, strength_model=1.0)
    text = graph.add(
        "ConditioningSetProperties",
        cond_NEW=graph.text(),
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    return model, text


@pytest.mark.parametrize("apply", [bypass, hook])
def test_bypass_and_hook_loras_do_what_a_loader_does(
    server: Server, plain: torch.Tensor, apply: Callable[[FluxGraph, Link], tuple[Link, Link]]
) -> None:
    graph = FluxGraph()
    latent = server.latent(graph, graph.sample(*apply(graph, graph.unet())))
    torch.testing.assert_close(latent, with_loras(server, (A, 1.0)), rtol=1e-2, atol=1e-2)
    assert torch.equal(with_loras(server), plain)


def test_a_control_lora_widens_the_input(server: Server, plain: torch.Tensor) -> None:
    def controlled(seed: int) -> torch.Tensor:
        graph = FluxGraph()
        model = graph.lora(graph.unet(), "control.safetensors")
        text = graph.add("Test_FillConditioning", conditioning=graph.text(), latent=graph.picture(seed))
        return server.latent(graph, graph.sample(model, text))

    assert differs(controlled(1), plain)
    assert differs(controlled(1), controlled(2))
    assert torch.equal(with_loras(server), plain)
