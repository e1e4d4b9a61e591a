"""FP8 segments as TensorRT gets them: the exported graph computes what eager FP8 does, in what has converters."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.unit.sums import added
from tests.unit.tiny_flux import bfl_weights, shapes_of, tiny_transformer
from trt_core.backends.base import Request
from trt_core.backends.check import error_ratio, relative_l2
from trt_core.backends.compiler import SegmentCompiler
from trt_core.backends.tensorrt import export
from trt_core.backends.tensorrt_fp8 import _is_fp8_cast, why_not_tensorrt_fp8
from trt_core.backends.tensorrt_worker import describe, parse
from trt_core.config import Profile, ShapeRange
from trt_core.engine_cache import EngineCache
from trt_core.flux import fp8, fp8_export
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.catalogue import BlockKind, SegmentName
from trt_core.flux.precision import FP8, PLAIN, Precision
from trt_core.gpu import GpuInfo
from trt_core.host import Silent
from trt_core.plan import WHOLE_SEGMENT

ARCH = FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer(head_dim=16))))
PROFILE = Profile(ShapeRange(8, 40, 64), ShapeRange(1, 7, 16), ShapeRange(1, 2, 4))
CPU = torch.device("cpu")
DOUBLE = frozenset(f"{s}_{layer}" for s in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2"))
SINGLE = frozenset(("linear1", "linear2"))
RECIPES = {
    "per row, dynamic": Precision(per_row=True, static=False),
    "per row, static": Precision(per_row=True, static=True),
    "per tensor, dynamic": Precision(per_row=False, static=False),
    "per tensor, static": Precision(per_row=False, static=True),
}
FP8_LAYERS = {
    SegmentName.DOUBLE_QKV: 2, SegmentName.DOUBLE_OUT: 6, SegmentName.DOUBLE_BLOCK: 8,
    SegmentName.SINGLE_QKV_MLP: 1, SegmentName.SINGLE_OUT: 1, SegmentName.SINGLE_BLOCK: 2,
}  # fmt: skip
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 1.5e-2, torch.float32: 1e-5}
"""Two roundings to bf16 for one (4e-3 at most), and the few E4M3 numbers that fall to the other side for it in the next
layer. The error of FP8 itself is 3e-2 and more."""
DEFAULT = "per row, dynamic"
CASES = [(name, DEFAULT) for name in FP8_LAYERS] + [(SegmentName.SINGLE_BLOCK, words) for words in RECIPES]
cases = pytest.mark.parametrize(
    ("name", "words"), dict.fromkeys(CASES), ids=lambda value: getattr(value, "value", value)
)


def request(name: SegmentName, recipe: Precision, dtype: torch.dtype = torch.bfloat16) -> Request:
    precisions = {BlockKind.DOUBLE: replace(recipe, fp8=DOUBLE), BlockKind.SINGLE: replace(recipe, fp8=SINGLE)}
    compiler = SegmentCompiler(ARCH, dtype, CPU, PROFILE, EngineCache(Path("unused")), 1.5, Silent(), precisions)
    return compiler.request(name)


@cache
def exported(name: SegmentName, words: str) -> torch.export.ExportedProgram:
    return export(request(name, RECIPES[words]))


@cache
def decomposed(name: SegmentName, words: str) -> torch.fx.Graph:
    """As torch_tensorrt gets it: every cast is one operation."""
    return exported(name, words).run_decompositions({}).graph


def casts(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.target is torch.ops.aten._to_copy.default and _is_fp8_cast(node)]


@cases
def test_the_exported_program_computes_what_eager_fp8_does(name: SegmentName, words: str) -> None:
    asked = request(name, RECIPES[words])
    run = exported(name, words).module()
    inputs = asked.segment.random_inputs(3, 61, 16, torch.bfloat16, CPU)
    outputs = (run(*inputs), asked.reference(*inputs))
    if name in WHOLE_SEGMENT.values():
        outputs = (added(outputs[0]), added(outputs[1]))
    for seen, expected in zip(*outputs, strict=True):
        assert relative_l2(seen, expected) < TOLERANCE[torch.bfloat16]
    assert error_ratio(run, asked) < 1.05


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    asked = request(SegmentName.SINGLE_OUT, RECIPES[DEFAULT], dtype)
    inputs = asked.segment.random_inputs(1, 40, 7, dtype, CPU)
    (seen,), (expected,) = export(asked).module()(*inputs), asked.reference(*inputs)
    assert seen.dtype is dtype
    assert relative_l2(seen, expected) < TOLERANCE[dtype]


def test_large_fp16_sums_do_not_overflow() -> None:
    """Sums of K products of numbers up to 448 pass fp16's range; what they stand for does not."""
    x, weight = torch.full((1, 2, 64), 3.0, dtype=torch.float16), torch.full((8, 64), 0.01)
    q, q_scale = fp8.quantize_rows(x)
    w, w_scale = fp8.quantize_rows(weight)
    out = fp8_export.scaled_linear(q, q_scale, w, w_scale, torch.zeros(8, dtype=torch.float16), torch.float16)
    torch.testing.assert_close(out.float(), F.linear(x.float(), weight), rtol=0.04, atol=0)


@cases
def test_each_product_has_one_cast_to_e4m3_and_two_back(name: SegmentName, words: str) -> None:
    """TensorRT fuses exactly this into an FP8 product: both operands come from E4M3, and nothing is between."""
    found = casts(decomposed(name, words))
    to, back = ([n for n in found if (n.kwargs["dtype"] is FP8) is into] for into in (True, False))
    assert (len(to), len(back)) == (FP8_LAYERS[name], 2 * FP8_LAYERS[name])
    assert all(user.target is torch.ops.aten.linear.default for node in back for user in node.users)
    assert {node.kwargs["dtype"] for node in back} == {torch.bfloat16}


@cases
def test_only_the_casts_need_converters_of_ours(name: SegmentName, words: str) -> None:
    touching = {
        node.target
        for node in decomposed(name, words).nodes
        if node.op == "call_function" and FP8 in map(_dtype, (node, *node.all_input_nodes))
    }
    # torch_tensorrt removes the assertions, which plain segments have as well.
    assert touching - {torch.ops.aten._assert_tensor_metadata.default} == {torch.ops.aten._to_copy.default}


def _dtype(node: torch.fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def test_weights_and_scales_stay_inputs() -> None:
    asked = request(SegmentName.SINGLE_OUT, RECIPES[DEFAULT])
    program = exported(SegmentName.SINGLE_OUT, DEFAULT)
    assert not program.constants
    assert not program.state_dict
    assert len(program.graph_signature.user_inputs) == len(asked.segment.activations) + len(asked.segment.weights)


def test_eager_calls_and_dynamo_do_not_take_the_exported_form() -> None:
    def which(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if fp8_export.exporting() else x - 1

    zero = torch.zeros(1)
    assert which(zero) == -1
    assert torch.compile(which, backend="eager", fullgraph=True)(zero) == -1


def test_a_builder_gets_the_same_request_and_the_key_knows_the_converters() -> None:
    asked = request(SegmentName.SINGLE_OUT, RECIPES[DEFAULT])
    fields = describe(asked, ARCH)
    assert parse(fields, CPU).precision == asked.precision
    assert fields["converters"]
    assert "converters" not in describe(replace(asked, precision=PLAIN), ARCH)


def test_what_tensorrt_cannot_do_is_said() -> None:
    recipe, old = replace(RECIPES[DEFAULT], fp8=SINGLE), GpuInfo("NVIDIA GeForce RTX 3090", (8, 6), 0, "580")
    assert why_not_tensorrt_fp8(PLAIN, old) is None
    assert why_not_tensorrt_fp8(recipe, replace(old, sm=(8, 9))) is None
    reason = why_not_tensorrt_fp8(recipe, old)
    assert reason is not None
    assert "RTX 3090 has compute capability 8.6; FP8 needs 8.9" in reason
