"""A block's precision: names, shapes and order of its inputs, which blocks share one; how FP8 segments are checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.sums import with_sums
from tests.unit.tiny_flux import bfl_weights, shapes_of, tiny_transformer
from trt_core import product_ranking
from trt_core.backends.base import Request
from trt_core.backends.check import check, error_ratio, relative_l2
from trt_core.backends.compiler import SegmentCompiler
from trt_core.backends.eager import EagerSegment
from trt_core.block_precisions import BlockPrecisions
from trt_core.compilation import Bound
from trt_core.config import Attention, Backend, Profile
from trt_core.engine_cache import EngineCache
from trt_core.errors import BuildFailed
from trt_core.flux import weights as flux_weights
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.catalogue import BlockKind, SegmentName
from trt_core.flux.linear import Fp8Weight, gelu_linear, linear, unquantized_inputs
from trt_core.flux.precision import FP8, PLAIN, Precision
from trt_core.fp8_recipe import Activations, Fp8Config, Granularity, block_linears, plan_recipe
from trt_core.host import Silent

ARCH = FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer(double=2, single=3))))
CPU = torch.device("cpu")
QKV = Precision(frozenset({"img_attn.qkv"}))
SHAPES = flux_weights.double_block_shapes(ARCH)
AMAX = dict.fromkeys(block_linears(ARCH), 2.0)


def of(*exclude: str, activations: Activations = Activations.DYNAMIC) -> BlockPrecisions:
    config = Fp8Config(Granularity.ROW, activations, exclude)
    return BlockPrecisions.of(ARCH, plan_recipe(ARCH, config, AMAX if activations is Activations.STATIC else None))


# -- the inputs of one block -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_row", "static", "scales"),
    [
        (True, False, [("weight_scale", (192, 1))]),
        (False, False, [("weight_scale", (1,))]),
        (True, True, [("weight_scale", (192, 1)), ("input_scale", (1,))]),
        (False, True, [("weight_scale", (1,)), ("input_scale", (1,))]),
    ],
)
def test_an_fp8_matrix_is_followed_by_its_scales(per_row: bool, static: bool, scales: list) -> None:
    precision = Precision(frozenset({"img_attn.qkv"}), per_row, static)
    bound = precision.bound(flux_weights.DOUBLE_QKV, SHAPES)
    first, *rest = bound
    assert (first.name, first.shape, first.dtype) == ("img_attn.qkv.weight", (192, 64), FP8)
    expected = [(f"img_attn.qkv.{kind}", shape, torch.float32) for kind, shape in scales]
    assert [(b.name, b.shape, b.dtype) for b in rest[: len(scales)]] == expected
    plain = [b for b in rest[len(scales) :] if b.dtype is None]
    assert [b.name for b in plain] == list(flux_weights.DOUBLE_QKV[1:])
    assert tuple(b.name for b in bound) == precision.inputs(flux_weights.DOUBLE_QKV)


def test_without_fp8_layers_nothing_is_added() -> None:
    assert PLAIN.inputs(flux_weights.DOUBLE_OUT) == flux_weights.DOUBLE_OUT
    assert all(b.dtype is None for b in PLAIN.bound(flux_weights.DOUBLE_OUT, SHAPES))
    assert PLAIN.words() == ""


@pytest.mark.parametrize("static", [False, True])
def test_tensors_are_put_together_again(static: bool) -> None:
    precision = Precision(frozenset({"img_attn.qkv", "txt_attn.qkv"}), True, static)
    names = precision.inputs(flux_weights.DOUBLE_QKV)
    by_name = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    items = precision.grouped(flux_weights.DOUBLE_QKV, list(by_name.values()))
    grouped = dict(zip(flux_weights.DOUBLE_QKV, items, strict=True))
    for layer in ("img_attn.qkv", "txt_attn.qkv"):
        found = grouped[f"{layer}.weight"]
        assert isinstance(found, Fp8Weight)
        assert found.weight is by_name[f"{layer}.weight"]
        assert found.scale is by_name[f"{layer}.weight_scale"]
        assert found.input_scale is (by_name[f"{layer}.input_scale"] if static else None)
    assert grouped["txt_attn.norm.key_norm.scale"] is by_name["txt_attn.norm.key_norm.scale"]


@pytest.mark.parametrize("precision", [PLAIN, QKV, Precision(frozenset({"linear1", "linear2"}), False, True)])
def test_it_survives_json(precision: Precision) -> None:
    assert Precision.from_dict(json.loads(json.dumps(precision.to_dict()))) == precision


def test_words() -> None:
    assert QKV.words() == "fp8 per row, dynamic"
    assert Precision(frozenset({"linear1"}), False, True).words() == "fp8 per tensor, static"


# -- the blocks of a model ---------------------------------------------------------------------------------------------


def test_blocks_have_all_layers_but_modulations() -> None:
    found = of()
    assert set(found.double) == {
        Precision(frozenset(f"{s}_{n}" for s in ("img", "txt") for n in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")))
    }
    assert set(found.single) == {Precision(frozenset({"linear1", "linear2"}))}
    assert (len(found.double), len(found.single)) == (2, 3)


def test_excluded_layers_are_left_out_of_their_block_alone() -> None:
    found = of("single_blocks.1.linear2", "double_blocks.0.*", "*_mlp.0")
    assert found.single[0] == found.single[2] == Precision(frozenset({"linear1", "linear2"}))
    assert found.single[1] == Precision(frozenset({"linear1"}))
    assert found.double[0] == PLAIN
    assert found.double[1].fp8 == {"img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj", "img_mlp.2",
                                   "txt_mlp.2"}  # fmt: skip


def norms(**gains: float) -> dict[str, Tensor]:
    """The norms' weights of all blocks: 1, or the given number where a name contains the given text."""
    shapes = flux_weights.weight_shapes(ARCH)
    names = [name for name in shapes if name.endswith("norm.scale")]
    return {
        name: torch.full(shapes[name], next((g for part, g in gains.items() if part in name), 1.0)) for name in names
    }


def fp8_attention(tensors: dict[str, Tensor]) -> tuple[list[bool], list[bool]]:
    found = BlockPrecisions.of(ARCH, plan_recipe(ARCH, Fp8Config()), tensors)
    return [p.fp8_attention for p in found.double], [p.fp8_attention for p in found.single]


def test_attention_may_be_fp8_where_the_norms_keep_logits_exact() -> None:
    assert fp8_attention(norms()) == ([True] * 2, [True] * 3)
    assert fp8_attention(norms(scale=3.0)) == ([False] * 2, [False] * 3)
    sharp = norms()
    sharp["single_blocks.1.norm.query_norm.scale"] *= 9
    # Text's keys meet the image's queries.
    sharp["double_blocks.1.txt_attn.norm.key_norm.scale"] *= 3
    sharp["double_blocks.1.img_attn.norm.query_norm.scale"] *= 3
    assert fp8_attention(sharp) == ([True, False], [True, False, True])
    assert not any(p.fp8_attention for p in (*of().double, *of().single)), "norms that nobody looked at"
    unusable = norms()
    unusable["single_blocks.0.norm.key_norm.scale"][0] = torch.nan
    assert fp8_attention(unusable)[1] == [False, True, True]


def test_modulations_alone_leave_the_blocks_as_they_are() -> None:
    found = of("*_attn.*", "*_mlp.*", "*.linear1", "*.linear2")
    assert set(found.double) | set(found.single) == {PLAIN}


def test_static_scales_are_inputs_of_every_fp8_layer() -> None:
    found = of("single_blocks.0.linear1", activations=Activations.STATIC)
    assert found.single[0] == Precision(frozenset({"linear2"}), True, True)
    assert found.single[1].inputs(flux_weights.SINGLE_OUT) == (
        "linear2.weight", "linear2.weight_scale", "linear2.input_scale", "linear2.bias",
    )  # fmt: skip


def test_weights_come_in_the_segments_order() -> None:
    precisions = of("single_blocks.1.*")
    names = [f"single_blocks.{i}.{n}" for i in range(3) for n in flux_weights.single_block_shapes(ARCH)]
    names += [f"double_blocks.{i}.{n}" for i in range(2) for n in SHAPES]
    scales = [n.replace(".weight", ".weight_scale") for n in names if n.endswith(".weight")]
    tensors = {name: torch.full((1,), float(i)) for i, name in enumerate((*names, *scales))}
    double, single = precisions.weights(tensors)
    assert [len(w.before) for w in double] == [10, 10]
    assert [len(w.after) for w in double] == [18, 18]
    assert [(len(w.before), len(w.after)) for w in single] == [(5, 3), (4, 2), (5, 3)]
    assert single[0].after[1] is tensors["single_blocks.0.linear2.weight_scale"]
    assert single[1].after[1] is tensors["single_blocks.1.linear2.bias"]


@pytest.mark.parametrize(
    "exclude",
    [
        (),
        ("single_blocks.1.linear2",),
        ("double_blocks.*",),
        ("double_blocks.0.*", "single_blocks.0.linear1", "single_blocks.2.linear2"),
    ],
)
def test_every_precision_is_in_a_pair(exclude: tuple[str, ...]) -> None:
    found = of(*exclude)
    pairs = Bound(torch.float32, CPU, found.double, found.single).pairs
    assert {d for d, _ in pairs} == set(found.double)
    assert {s for _, s in pairs} == set(found.single)
    assert len(pairs) == max(len(set(found.double)), len(set(found.single)))


def test_a_model_without_double_blocks_has_a_pair_too() -> None:
    assert Bound(torch.float32, CPU, (), (QKV,)).pairs == [(PLAIN, QKV)]


# -- how an FP8 segment is checked -------------------------------------------------------------------------------------


def compiler(tmp_path: Path, static: bool = False, **options: Any) -> SegmentCompiler:
    found = of(activations=Activations.STATIC if static else Activations.DYNAMIC)
    return SegmentCompiler(
        ARCH, torch.bfloat16, CPU, Profile.around(1, 64, 16), EngineCache(str(tmp_path)), 1.5, Silent(),
        {BlockKind.DOUBLE: found.double[0], BlockKind.SINGLE: found.single[0]}, **options,
    )  # fmt: skip


def request(name: SegmentName, tmp_path: Path, static: bool = False) -> Request:
    return compiler(tmp_path, static).request(name)


class Wrong:
    """A segment whose inputs are spoiled on the way: what a bad engine would compute."""

    backend = Backend.INDUCTOR
    plan_bytes = 0

    def __init__(self, made: Request, suffix: str, factor: float) -> None:
        self._inner, names = EagerSegment(made), [w.name for w in made.segment.weights]
        self._spoiled = {len(made.segment.activations) + i for i, n in enumerate(names) if n.endswith(suffix)}
        assert self._spoiled
        self._factor = factor

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._inner(*(t * self._factor if i in self._spoiled else t for i, t in enumerate(tensors)))

    def close(self) -> None:
        return None


SEGMENTS = [SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT, SegmentName.SINGLE_QKV_MLP, SegmentName.SINGLE_OUT,
            SegmentName.DOUBLE_BLOCK, SegmentName.SINGLE_BLOCK]  # fmt: skip


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", SEGMENTS)
def test_the_check_passes_what_is_right(name: SegmentName, static: bool, tmp_path: Path) -> None:
    made = request(name, tmp_path, static)
    assert error_ratio(EagerSegment(made), made) == 1.0


@pytest.mark.parametrize("name", SEGMENTS)
def test_the_check_refuses_scales_that_are_not_applied(name: SegmentName, tmp_path: Path) -> None:
    made = request(name, tmp_path)
    with pytest.raises(BuildFailed, match="times eager PyTorch's error"):
        check(Wrong(made, "weight_scale", 1.2), made, 1.5)


def test_the_check_refuses_a_static_scale_that_clamps(tmp_path: Path) -> None:
    """Ten times too small, so that activations beyond the range are cut off."""
    made = request(SegmentName.SINGLE_QKV_MLP, tmp_path, static=True)
    with pytest.raises(BuildFailed, match="times eager PyTorch's error"):
        check(Wrong(made, "input_scale", 0.1), made, 1.5)


@pytest.mark.parametrize("static", [False, True])
def test_random_weights_are_as_a_trained_models(static: bool, tmp_path: Path) -> None:
    made = request(SegmentName.SINGLE_QKV_MLP, tmp_path, static)
    inputs = made.segment.random_inputs(1, 64, 16, torch.bfloat16, CPU)
    weights = dict(zip((w.name for w in made.segment.weights), inputs[len(made.segment.activations) :], strict=True))
    for bound in made.segment.weights:
        assert weights[bound.name].dtype == (bound.dtype or torch.bfloat16)
        assert tuple(weights[bound.name].shape) == bound.shape
    matrix = weights["linear1.weight"].float() * weights["linear1.weight_scale"]
    assert float(matrix.std()) == pytest.approx(ARCH.hidden**-0.5, rel=0.1)
    assert 300 < float(weights["linear1.weight"].float().abs().max()) <= 448


def test_the_exact_reference_quantizes_no_inputs_and_is_left_by_an_error() -> None:
    random = torch.Generator().manual_seed(0)
    x, matrix, bias = torch.randn(1, 5, 32, generator=random), torch.randn(16, 32, generator=random), torch.zeros(16)
    scale = matrix.abs().amax(1, keepdim=True) / 448
    weight = Fp8Weight((matrix / scale).to(FP8), scale, None)
    exact = torch.nn.functional.linear(x, weight.weight.float() * scale)
    with unquantized_inputs():
        assert torch.equal(linear(x, weight, bias), exact)
    quantized = linear(x, weight, bias)
    assert 0.005 < relative_l2(quantized, exact) < 0.06
    with pytest.raises(ZeroDivisionError), unquantized_inputs():
        _ = 1 / 0
    assert torch.equal(linear(x, weight, bias), quantized)
    assert not torch.equal(gelu_linear(x, weight, bias), quantized)


# -- products in the model's dtype -------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", SEGMENTS)
def test_wide_products_round_the_weights_alone(name: SegmentName, static: bool, tmp_path: Path) -> None:
    """Their error against unquantized inputs is bf16's, a tenth of that of FP8's own products."""
    wide = compiler(tmp_path, static, wide=frozenset({name.kind}))
    made = with_sums(wide.request(name, Attention.AUTO))
    assert 0 < error_ratio(EagerSegment(made), made) < 0.4
    for other in (wide.request(name), compiler(tmp_path, static).request(name, Attention.AUTO)):
        assert error_ratio(EagerSegment(other), other) == 1.0, "TensorRT's segments, and those of other kinds"


def test_products_are_ranked_by_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.5, 0.4, 0.3, 0.3))
    outputs: list[Tensor] = []

    def timed(run: Callable[[], Tensor], *_: object) -> float:
        outputs.append(run())
        return next(times)

    monkeypatch.setattr(product_ranking, "median_milliseconds", timed)
    found, measured = product_ranking._ranked(compiler(tmp_path))
    assert found == {BlockKind.DOUBLE}
    assert [(m.what, m.backend, m.milliseconds) for m in measured] == [
        ("double product", "fp8", 0.5), ("double product", "widened", 0.4),
        ("single product", "fp8", 0.3), ("single product", "widened", 0.3),
    ]  # fmt: skip
    rows = {BlockKind.DOUBLE: 64, BlockKind.SINGLE: 64 + 16}
    for fp8, widened, kind in zip(outputs[::2], outputs[1::2], BlockKind, strict=True):
        assert fp8.shape == widened.shape == (rows[kind], fp8.shape[1])
        assert relative_l2(fp8, widened) < 0.05, "the same product both ways"


def test_on_a_cpu_and_without_fp8_nothing_is_ranked(tmp_path: Path) -> None:
    assert product_ranking.rank_products(compiler(tmp_path)) == (frozenset(), [])
    plain = SegmentCompiler(
        ARCH, torch.bfloat16, CPU, Profile.around(1, 64, 16), EngineCache(str(tmp_path)), 1.5, Silent()
    )
    assert product_ranking._ranked(plain) == (frozenset(), [])
