"""Compiled FLUX in a real graph equals ComfyUI's own run, whatever the graph does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.comfy.graph import FluxGraph, Link
from tests.comfy.pack import TOLERANCE, Said, both, compiled
from tests.comfy.server import Server
from tests.comfy.tensors import differs, relative_error

pytestmark = pytest.mark.comfy

Compile = Callable[[Link], Link]
Build = Callable[[FluxGraph, Compile], Link]
ALL = 4
"""Blocks of the test checkpoints: 2 double and 2 single ones."""


def assert_equal(server: Server, build: Build, blocks: int = ALL) -> Said:
    reference, latent, said = both(server, build)
    assert relative_error(latent, reference) < TOLERANCE
    assert said.compiled == blocks
    return said


def test_the_node_is_there_with_its_options_folded(server: Server) -> None:
    info = server.object_info("TRT_CompileTransformer")
    assert info is not None
    assert (info["category"], info["output"]) == ("TensorRT", ["MODEL"])
    inputs = info["input"]["required"]
    folded = [name for name, (_, options) in inputs.items() if options.get("advanced")]
    assert folded == ["attention", "base_weights", "profile", "max_side", "max_batch", "outside_profile"]
    assert all(options.get("tooltip") for _, options in inputs.values())


@pytest.mark.parametrize("unet", ["dev", "schnell", "prefixed"])
def test_models(server: Server, unet: str) -> None:
    said = assert_equal(server, lambda g, c: g.sample(c(g.unet(f"flux_{unet}.safetensors")), g.text()))
    assert "eager" in said.text


def fill(g: FluxGraph, c: Compile) -> Link:
    text = g.add("Test_FillConditioning", conditioning=g.text(), latent=g.picture())
    return g.sample(c(g.unet("flux_fill.safetensors")), text)


def control(g: FluxGraph, c: Compile, **options: object) -> Link:
    settings = {"seed": 1, "strength": 1.0, "blocks": "both", "stride": 1, "end_percent": 1.0, **options}
    return g.sample(c(g.unet()), g.add("Test_Control", conditioning=g.text(), **settings))


def control_and_cfg(g: FluxGraph, c: Compile) -> Link:
    text = g.text()
    settings = {"seed": 1, "strength": 1.0, "blocks": "both", "stride": 1, "end_percent": 1.0}
    return g.sample(c(g.unet()), g.add("Test_Control", conditioning=text, **settings), negative=text, cfg=3.0)


def references(method: str) -> Build:
    def build(g: FluxGraph, c: Compile) -> Link:
        text = g.text()
        for seed in (1, 2):
            text = g.add("ReferenceLatent", conditioning=text, latent=g.picture(seed, width=128, height=192))
        text = g.add("FluxKontextMultiReferenceLatentMethod", conditioning=text, reference_latents_method=method)
        return g.sample(c(g.unet()), text)

    return build


def mask(g: FluxGraph, c: Compile) -> Link:
    text = g.add("Test_AttentionMask", conditioning=g.text(), tokens=8, bias=-4.0)
    return g.sample(c(g.unet()), text, latent=g.picture(width=264, height=248))


def sized(width: int, height: int, batch: int) -> Build:
    return lambda g, c: g.sample(c(g.unet()), g.text(), latent=g.picture(width=width, height=height, batch=batch))


def with_options(**options: object) -> Build:
    return lambda g, c: g.sample(c(g.unet()), g.text(), **options)


def with_text(**options: object) -> Build:
    return lambda g, c: g.sample(c(g.unet()), g.text(**options))


def uneven_cfg(g: FluxGraph, c: Compile) -> Link:
    """Prompts of different lengths: ComfyUI makes two calls."""
    return g.sample(c(g.unet()), g.text(), negative=g.text(seed=5, tokens=48), cfg=3.0)


def flux_sampling(g: FluxGraph, model: Link) -> Link:
    return g.add("ModelSamplingFlux", model=model, max_shift=2.0, base_shift=1.0, width=256, height=256)


def merged(g: FluxGraph, model: Link) -> Link:
    return g.add("ModelMergeSimple", model1=model, model2=g.unet("flux_dev_2.safetensors"), ratio=0.5)


def easy_cache(g: FluxGraph, model: Link) -> Link:
    settings = {"reuse_threshold": 2.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    return g.add("EasyCache", model=model, **settings)


def rope_scale(g: FluxGraph, model: Link) -> Link:
    settings = {"scale_x": 1.5, "shift_x": 0.0, "scale_y": 0.5, "shift_y": 2.0, "scale_t": 1.0, "shift_t": 0.0}
    return g.add("ScaleROPE", model=model, **settings)


def before(change: Callable[[FluxGraph, Link], Link], **options: object) -> Build:
    return lambda g, c: g.sample(c(change(g, g.unet())), g.text(), **options)


def after(change: Callable[[FluxGraph, Link], Link], **options: object) -> Build:
    return lambda g, c: g.sample(change(g, c(g.unet())), g.text(), **options)


GRAPHS: dict[str, Build] = {
    "Fill": fill,
    "ControlNet": control,
    "ControlNet on every second block": lambda g, c: control(g, c, stride=2),
    "ControlNet on single blocks": lambda g, c: control(g, c, blocks="single"),
    "ControlNet until the middle": lambda g, c: control(g, c, end_percent=0.5),
    "ControlNet and CFG": control_and_cfg,
    "references by offset": references("offset"),
    "references by index": references("index"),
    "references by uxo": references("uxo/uno"),
    "attention mask at an odd size": mask,
    "guidance by default": with_text(guidance_mode="default"),
    "guidance absent": with_text(guidance_mode="none"),
    "long prompt": with_text(tokens=512),
    "batch 2": sized(256, 256, 2),
    "odd size": sized(264, 248, 1),
    "wide": sized(320, 128, 1),
    "CFG": lambda g, c: g.sample(c(g.unet()), g.text(), negative=g.text(seed=5), cfg=3.0),
    "CFG with uneven prompts": uneven_cfg,
    "heun": with_options(sampler="heun"),
    "dpmpp_2m": with_options(sampler="dpmpp_2m", scheduler="beta"),
    "from a picture": lambda g, c: g.sample(c(g.unet()), g.text(), latent=g.picture(), denoise=0.6),
    "ModelSamplingFlux before": before(flux_sampling),
    "ModelSamplingFlux after": after(flux_sampling),
    "merge before": before(merged),
    "merge after": after(merged),
    "EasyCache before": before(easy_cache, steps=8),
    "EasyCache after": after(easy_cache, steps=8),
    "ScaleROPE before": before(rope_scale),
    "ScaleROPE after": after(rope_scale),
}


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS.keys())
def test_what_a_flux_graph_does(server: Server, build: Build) -> None:
    assert_equal(server, build)


def test_two_of_our_nodes_in_a_row_are_one(server: Server) -> None:
    inner: list[Link] = []

    def build(g: FluxGraph, c: Compile) -> Link:
        model = g.unet()
        if c(model) is not model:
            inner.append(compiled(g, model, base_weights="host"))
        return g.sample(c(inner[-1] if inner else model), g.text())

    assert assert_equal(server, build).builds == 1


def test_two_samplers_of_one_graph_share_what_is_bound(server: Server) -> None:
    def build(g: FluxGraph, c: Compile) -> Link:
        model = c(g.unet())
        first = g.sample(model, g.text(), steps=2)
        return g.sample(model, g.text(seed=2), latent=first, denoise=0.5)

    assert assert_equal(server, build).builds == 1


@pytest.mark.parametrize(("kind", "index"), [("double_block", 1), ("single_block", 0)])
@pytest.mark.parametrize("replacement", ["original", "half", "skip"])
@pytest.mark.parametrize("place", [before, after])
def test_a_replaced_block_is_comfyuis_and_the_others_stay_compiled(
    server: Server, kind: str, index: int, replacement: str, place: Callable[..., Build]
) -> None:
    def change(g: FluxGraph, model: Link) -> Link:
        return g.add("Test_ReplaceBlock", model=model, kind=kind, index=index, replacement=replacement)

    said = assert_equal(server, place(change), blocks=ALL - 1)
    assert f"ComfyUI runs {kind}s.{index}: another node replaces it" in said.text


PATCHES = {
    "post_input": ALL,
    "attn1_patch": 0,
    "attn1_output_patch": 0,
    "attention_override": 0,
    "model_function_wrapper": ALL,
    "diffusion_model_wrapper": ALL,
}


@pytest.mark.parametrize(("kind", "blocks"), PATCHES.items())
@pytest.mark.parametrize("place", [before, after])
def test_patches_of_other_nodes(server: Server, kind: str, blocks: int, place: Callable[..., Build]) -> None:
    def change(g: FluxGraph, model: Link) -> Link:
        return g.add("Test_Patch", model=model, kind=kind, factor=0.8)

    assert_equal(server, place(change), blocks=blocks)


@pytest.mark.parametrize("place", [before, after])
def test_a_replaced_module_stays_the_other_nodes(server: Server, place: Callable[..., Build]) -> None:
    """ComfyUI loads and patches it its own way, LoRA included."""

    def change(g: FluxGraph, model: Link) -> Link:
        return g.lora(g.add("Test_ReplaceModule", model=model, index=1), "a.safetensors")

    said = assert_equal(server, place(change), blocks=ALL - 1)
    assert "ComfyUI runs single_blocks.1: another node replaces it or its weights" in said.text


@pytest.mark.parametrize("place", [before, after])
@pytest.mark.parametrize("lora", [False, True])
def test_bf16_is_as_close_to_fp32_as_comfyuis_own(server: Server, place: Callable[..., Build], lora: bool) -> None:
    def model(g: FluxGraph, model: Link) -> Link:
        return g.lora(model, "a.safetensors") if lora else model

    def in_bf16(g: FluxGraph, source: Link) -> Link:
        return g.add("ModelComputeDtype", model=model(g, source), dtype="bf16")

    exact = FluxGraph()
    truth = server.latent(exact, exact.sample(model(exact, exact.unet()), exact.text()))
    reference, latent, said = both(server, place(in_bf16))
    assert said.compiled == ALL
    assert relative_error(reference, truth) > 1e-3
    assert relative_error(latent, truth) < 1.3 * relative_error(reference, truth)
    assert_equal(server, lambda g, c: g.sample(c(g.unet()), g.text()))


def test_the_cases_differ_from_each_other(server: Server) -> None:
    """That a compiled run equals ComfyUI's own says something only where the case changes the picture."""
    plain = FluxGraph()
    reference = server.latent(plain, plain.sample(plain.unet(), plain.text()))
    for case in ("ControlNet", "references by uxo", "merge after", "ScaleROPE after", "guidance absent"):
        graph = FluxGraph()
        node = []
        result = GRAPHS[case](graph, lambda model, g=graph, node=node: node.append(compiled(g, model)) or node[-1])
        assert differs(server.latent(graph, result), reference), case
