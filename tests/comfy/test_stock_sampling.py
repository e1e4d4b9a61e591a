"""ComfyUI alone samples our small FLUX files: same bits each time, and every input changes the picture.

These are the references that compiled runs are compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.comfy.graph import FluxGraph, Link
from tests.comfy.process import ServerProcess
from tests.comfy.server import Server
from tests.comfy.tensors import differs, relative_error

pytestmark = pytest.mark.comfy


def sampled(server: Server, unet: str = "flux_dev.safetensors", **options: object) -> torch.Tensor:
    graph = FluxGraph()
    return server.latent(graph, graph.sample(graph.unet(unet), graph.text(), **options))


@pytest.fixture(scope="module")
def plain(server: Server) -> torch.Tensor:
    return sampled(server)


def test_four_euler_steps_give_a_finite_latent_of_its_own(plain: torch.Tensor) -> None:
    assert plain.shape == (1, 16, 32, 32)
    assert plain.dtype == torch.float32
    assert plain.isfinite().all()
    assert 0.1 < plain.std() < 10
    assert (plain - plain.roll(1, dims=-1)).std() > 0.01


def test_sampling_twice_gives_the_same_bits(server: Server, plain: torch.Tensor) -> None:
    assert torch.equal(sampled(server), plain)


def test_bf16_file_is_computed_in_fp32(server_process: ServerProcess, plain: torch.Tensor) -> None:
    if "--cpu" not in server_process.flags:
        pytest.skip("only a CPU computes FLUX in fp32")
    assert "model weight dtype torch.float32, manual cast: None" in server_process.log_text()


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"steps": 5}, {"sampler": "heun"}, {"sampler": "dpmpp_2m"}, {"scheduler": "beta"}],
    ids=str,
)
def test_sampler_settings_change_the_picture(server: Server, plain: torch.Tensor, change: dict) -> None:
    assert differs(sampled(server, **change), plain)


@pytest.mark.parametrize("text", [{"seed": 2}, {"tokens": 40}, {"guidance": 1.0}, {"guidance_mode": "none"}], ids=str)
def test_conditioning_changes_the_picture(server: Server, plain: torch.Tensor, text: dict) -> None:
    graph = FluxGraph()
    latent = server.latent(graph, graph.sample(graph.unet(), graph.text(**text)))
    assert differs(latent, plain)


def test_default_guidance_is_three_and_a_half(server: Server, plain: torch.Tensor) -> None:
    graph = FluxGraph()
    latent = server.latent(graph, graph.sample(graph.unet(), graph.text(guidance_mode="default")))
    assert torch.equal(latent, plain)


def test_schnell_ignores_guidance(server: Server) -> None:
    pictures = []
    for guidance in (1.0, 4.0):
        graph = FluxGraph()
        model = graph.unet("flux_schnell.safetensors")
        pictures.append(server.latent(graph, graph.sample(model, graph.text(guidance=guidance))))
    assert torch.equal(*pictures)


def test_a_prefixed_checkpoint_is_the_same_model(server: Server, plain: torch.Tensor) -> None:
    assert torch.equal(sampled(server, "flux_prefixed.safetensors"), plain)


def test_scaled_fp8_is_close_to_bf16(server: Server, plain: torch.Tensor) -> None:
    latent = sampled(server, "flux_fp8.safetensors")
    assert 0.001 < relative_error(latent, plain) < 0.3


def test_cfg_uses_the_negative_prompt(server: Server, plain: torch.Tensor) -> None:
    graph = FluxGraph()
    negative = graph.text(seed=5)
    latent = server.latent(graph, graph.sample(graph.unet(), graph.text(), negative=negative, cfg=3.0))
    assert differs(latent, plain)


@pytest.mark.parametrize(("width", "height", "batch"), [(256, 256, 2), (264, 248, 1), (128, 320, 1)], ids=str)
def test_batches_and_odd_sizes(server: Server, width: int, height: int, batch: int) -> None:
    graph = FluxGraph()
    latent = graph.picture(width=width, height=height, batch=batch)
    samples = server.latent(graph, graph.sample(graph.unet(), graph.text(), latent=latent))
    assert samples.shape == (batch, 16, height // 8, width // 8)
    assert samples.isfinite().all()
    assert batch == 1 or differs(samples[0], samples[1])


def test_fill_sees_the_picture_it_fills(server: Server) -> None:
    def filled(seed: int) -> torch.Tensor:
        graph = FluxGraph()
        text = graph.add("Test_FillConditioning", conditioning=graph.text(), latent=graph.picture(seed))
        return server.latent(graph, graph.sample(graph.unet("flux_fill.safetensors"), text))

    assert torch.equal(filled(1), filled(1))
    assert differs(filled(1), filled(2))


@pytest.mark.parametrize("method", ["offset", "index", "uxo/uno"])
def test_reference_latents_change_the_picture(server: Server, plain: torch.Tensor, method: str) -> None:
    graph = FluxGraph()
    text = graph.text()
    for seed in (1, 2):
        reference = graph.picture(seed, width=128, height=192)
        text = graph.add("ReferenceLatent", conditioning=text, latent=reference)
    text = graph.add("FluxKontextMultiReferenceLatentMethod", conditioning=text, reference_latents_method=method)
    latent = server.latent(graph, graph.sample(graph.unet(), text))
    assert latent.shape == plain.shape
    assert differs(latent, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda graph, model: graph.add(
            "ModelSamplingFlux", model=model, max_shift=2.0, base_shift=1.0, width=256, height=256
        ),
        lambda graph, model: graph.add(
            "ModelMergeSimple", model1=model, model2=graph.unet("flux_dev_2.safetensors"), ratio=0.5
        ),
        lambda graph, model: graph.add(
            "EasyCache", model=model, reuse_threshold=2.0, start_percent=0.1, end_percent=0.95, verbose=False
        ),
    ],
    ids=["ModelSamplingFlux", "ModelMergeSimple", "EasyCache"],
)
def test_stock_model_nodes_change_the_picture(
    server: Server, plain: torch.Tensor, change: Callable[[FluxGraph, Link], Link]
) -> None:
    graph = FluxGraph()
    latent = server.latent(graph, graph.sample(change(graph, graph.unet()), graph.text()))
    assert latent.isfinite().all()
    assert differs(latent, plain)
