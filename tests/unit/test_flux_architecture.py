"""The architecture read from weights and from diffusers' config, and weights that do not fit it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.tiny_flux import bfl_weights, loaded, shapes_of, tiny_transformer
from trt_core.config import Backend, CompileConfig
from trt_core.errors import UnsupportedModel
from trt_core.flux.architecture import FluxArchitecture, scaled_axes
from trt_core.flux.weights import check_complete, diffusers_parts, weight_shapes
from trt_core.mutable_module import MutableTRTModule

VARIANTS: dict[str, dict[str, Any]] = {
    "dev": {},
    "schnell": {"guidance": False},
    "fill": {"in_channels": 384, "out_channels": 64},
    "depth": {"in_channels": 128, "out_channels": 64},
    "other numbers": {"heads": 3, "head_dim": 16, "double": 1, "single": 3},
    "no single blocks": {"single": 0},
}
DEV = FluxArchitecture(
    hidden=3072, heads=24, double_depth=19, single_depth=38, in_channels=64, out_channels=64, context_dim=4096,
    vec_dim=768, mlp_hidden=12288, guidance=True,
)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_weights_and_config_say_the_same(variant: dict[str, Any]) -> None:
    model = tiny_transformer(**variant)
    from_config = FluxArchitecture.from_diffusers_config(model.config)
    assert FluxArchitecture.from_shapes(shapes_of(bfl_weights(model))) == from_config
    assert from_config.guidance is variant.get("guidance", True)
    assert from_config.in_channels == variant.get("in_channels", 64)
    assert from_config.out_channels == 64


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_names_and_shapes_are_those_of_a_checkpoint(variant: dict[str, Any]) -> None:
    weights = bfl_weights(tiny_transformer(**variant))
    arch = FluxArchitecture.from_shapes(shapes_of(weights))
    assert weight_shapes(arch) == shapes_of(weights)


def test_full_size_dev_has_its_published_size() -> None:
    assert sum(torch.Size(shape).numel() for shape in weight_shapes(DEV).values()) == 11_901_408_320
    assert FluxArchitecture.from_shapes(weight_shapes(DEV)) == DEV


def test_diffusers_parts_fill_every_row_once() -> None:
    model = tiny_transformer()
    state, weights = model.state_dict(), bfl_weights(model)
    arch = FluxArchitecture.from_shapes(shapes_of(weights))
    sources = []
    for name, parts in diffusers_parts(arch).items():
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == weights[name].shape[0]
        sources += [part.source for part in parts]
        if not name.startswith("final_layer.adaLN"):  # the one whose halves are exchanged
            assert torch.equal(torch.cat([state[part.source] for part in parts]), weights[name])
    assert sorted(sources) == sorted(state)


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14)), (16, (4, 6, 6))]
)
def test_rope_axes_scale_with_the_head(head_dim: int, axes: tuple[int, int, int]) -> None:
    assert scaled_axes(head_dim) == axes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 2}, "patch_size is 2"),
        ({"axes_dims_rope": (16, 56, 56)}, "do not fit heads of 32"),
        ({"num_attention_heads": 0}, "0 heads"),
    ],
)
def test_a_config_that_is_no_flux_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        FluxArchitecture.from_diffusers_config({**tiny_transformer().config, **change})


def test_a_config_without_a_number_is_refused() -> None:
    config = dict(tiny_transformer().config)
    del config["pooled_projection_dim"]
    with pytest.raises(UnsupportedModel, match="no 'pooled_projection_dim'"):
        FluxArchitecture.from_diffusers_config(config)


def _without(name: str) -> Any:
    return lambda shapes: shapes.pop(name)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda shapes: shapes.clear(), "not a FLUX.1 transformer: it has no img_in.weight"),
        (_without("final_layer.linear.weight"), "it has no final_layer.linear.weight"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("double_blocks.0.")], r"double_blocks\.0 is missing"),
        (lambda s: [s.pop(n) for n in list(s) if "query_norm" in n], "no block with q/k norms"),
    ],
)
def test_shapes_that_are_no_flux_are_refused(break_it: Any, said: str) -> None:
    shapes = shapes_of(bfl_weights(tiny_transformer()))
    break_it(shapes)
    with pytest.raises(UnsupportedModel, match=said):
        FluxArchitecture.from_shapes(shapes)


def test_a_missing_weight_is_named() -> None:
    weights = bfl_weights(tiny_transformer())
    arch = FluxArchitecture.from_shapes(shapes_of(weights))
    del weights["double_blocks.1.img_attn.qkv.weight"], weights["single_blocks.0.linear2.bias"]
    with pytest.raises(UnsupportedModel, match=r"2 weights are missing.* double_blocks\.1\.img_attn\.qkv\.weight"):
        check_complete(arch, shapes_of(weights))


def test_an_extra_weight_is_named() -> None:
    weights = bfl_weights(tiny_transformer())
    arch = FluxArchitecture.from_shapes(shapes_of(weights))
    with pytest.raises(UnsupportedModel, match=r"do not belong to FLUX\.1, the first is double_blocks\.0\.extra"):
        check_complete(arch, shapes_of(weights) | {"double_blocks.0.extra": (1,)})


def test_a_wrong_shape_is_named() -> None:
    weights = bfl_weights(tiny_transformer())
    arch = FluxArchitecture.from_shapes(shapes_of(weights))
    shapes = shapes_of(weights) | {"single_blocks.1.linear1.weight": (64, 64)}
    with pytest.raises(UnsupportedModel, match=r"single_blocks\.1\.linear1\.weight has shape \(64, 64\).*\(448, 64\)"):
        check_complete(arch, shapes)


def _half_of(weights: dict[str, Tensor]) -> None:
    weights["img_in.weight"] = weights["img_in.weight"].half()


def _transposed(weights: dict[str, Tensor]) -> None:
    weights["txt_in.weight"] = weights["txt_in.weight"].T.contiguous().T


def _integers(weights: dict[str, Tensor]) -> None:
    weights.update({name: tensor.to(torch.int8) for name, tensor in weights.items()})


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_half_of, r"dtypes torch\.float16, torch\.float32"),
        (_integers, r"dtypes torch\.int8"),
        (_transposed, r"txt_in\.weight is not contiguous"),
        (lambda weights: weights.pop("txt_in.bias"), "1 weights are missing, the first is txt_in.bias"),
    ],
)
def test_weights_that_cannot_be_bound_are_refused(break_it: Any, said: str, tmp_path: Path) -> None:
    weights = bfl_weights(tiny_transformer())
    arch = FluxArchitecture.from_shapes(shapes_of(weights))
    break_it(weights)
    module = MutableTRTModule(arch, CompileConfig(Backend.EAGER, cache_folder=str(tmp_path)))
    with pytest.raises(UnsupportedModel, match=said):
        module.load(weights)


def test_an_architecture_of_another_depth_is_refused(tmp_path: Path) -> None:
    module = loaded(bfl_weights(tiny_transformer()), tmp_path)
    deeper = MutableTRTModule(replace(module.arch, single_depth=3), module.config)
    with pytest.raises(UnsupportedModel, match=r"the first is single_blocks\.2"):
        deeper.load(bfl_weights(tiny_transformer()))
