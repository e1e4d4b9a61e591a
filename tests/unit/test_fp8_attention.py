"""Attention in E4M3: the reference's arithmetic, and whole blocks that hand q, k, v over rounded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import trt_core
from tests.unit.sums import added
from tests.unit.tiny_flux import bfl_weights, shapes_of, tiny_transformer
from trt_core.backends.check import relative_l2
from trt_core.config import Attention
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.attention import attend, attention_function
from trt_core.flux.catalogue import SegmentName, segment
from trt_core.flux.fp8 import FP8, quantize_rows
from trt_core.flux.fp8_attention import QkvStream, ValueSource, attend_fp8, attend_qkv, logit_noise, quantized_qkv
from trt_core.flux.precision import Precision

CPU = torch.device("cpu")
HEADS, DIM, WIDTH = 3, 16, 64
FP8_LAYERS = {
    SegmentName.DOUBLE_BLOCK: ("img_attn.proj", "txt_attn.proj"),
    SegmentName.SINGLE_BLOCK: ("linear2",),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(tokens: int, seed: int, extra: int = 0) -> QkvStream:
    """With values of v around 40: a scale that is forgotten shows."""
    qkv = normal(2, tokens, 3 * HEADS * DIM + extra, seed=seed)
    source = value_source(seed + 4)
    qkv[..., 2 * HEADS * DIM : 3 * HEADS * DIM] = values(source, normal(2, tokens, WIDTH, seed=seed + 9))
    angles = normal(tokens, DIM // 2, seed=seed + 1)
    norms = (1 + 0.1 * normal(DIM, seed=seed + s) for s in (2, 3))
    return QkvStream(qkv, *norms, angles.cos(), angles.sin(), source)


def value_source(seed: int, gain: float = 1.0, moved: float = 0.5) -> ValueSource:
    """E4M3, with a scale for each row."""
    shift, scale = (moved * normal(2, WIDTH, seed=seed + s) for s in (1, 2))
    weight, weight_scale = quantize_rows(normal(HEADS * DIM, WIDTH, seed=seed) * gain)
    return ValueSource(shift, scale, weight, weight_scale, gain * normal(HEADS * DIM, seed=seed + 3))


def values(source: ValueSource, x: Tensor) -> Tensor:
    """v of x [2, n, WIDTH], whose modulated norm is rounded to E4M3."""
    normed = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + source.scale[:, None]) + source.shift[:, None]
    rounded, scale = quantize_rows(normed)
    matrix = source.weight.float() * (1 if source.weight_scale is None else source.weight_scale)
    return (rounded.float() * scale) @ matrix.T + source.bias


def exact(img: QkvStream, txt: QkvStream) -> Tensor:
    """Attention over both streams in fp64, from the definition."""
    parts = []
    for s in (txt, img):
        q, k, v = (x.unflatten(-1, (HEADS, DIM)).double() for x in s.qkv.split(HEADS * DIM, -1)[:3])
        parts.append((*(turned(normed(x, n), s) for x, n in ((q, s.query_norm), (k, s.key_norm))), v))
    q, k, v = (torch.cat(p, 1).transpose(1, 2) for p in zip(*parts, strict=True))
    return ((q @ k.transpose(-1, -2) / DIM**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def normed(x: Tensor, norm: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()


def turned(x: Tensor, s: QkvStream) -> Tensor:
    """Neighbours as complex numbers, times cos + i sin."""
    angle = torch.complex(s.cos.double(), s.sin.double())[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angle).flatten(-2)


def test_from_products_to_attention() -> None:
    img, txt = stream(50, 1), stream(14, 7)
    seen = attend_qkv(img, txt, HEADS)
    assert (seen.values.dtype, seen.values.shape, seen.scale.shape) == (FP8, (2, 64, HEADS * DIM), (1,))
    assert relative_l2(seen.dequantized(), exact(img, txt).float()) < 0.08
    without_text = attend_qkv(img, None, HEADS)
    assert relative_l2(without_text.dequantized(), exact(img, txt).float()[:, 14:]) > 0.2, "text tokens do not matter"


def test_q_k_v_are_rounded_once_and_text_comes_first() -> None:
    img, txt = stream(5, 1, extra=9), stream(3, 7)
    q, k, v, scale, factor = quantized_qkv(img, txt, HEADS)
    assert {x.dtype for x in (q, k, v)} == {FP8}
    assert all(x.is_contiguous() for x in (q, k, v))
    all_v = torch.cat([s.qkv[..., 2 * HEADS * DIM : 3 * HEADS * DIM] for s in (txt, img)], 1)
    assert float(scale) == pytest.approx(float(all_v.abs().max()) / 448)
    assert relative_l2((v.float() * scale * factor).flatten(2), all_v) < 0.04
    assert float(factor) > 1, "v's scale is not the bound's"
    expected = turned(normed(txt.qkv[..., : HEADS * DIM].unflatten(-1, (HEADS, DIM)).double(), txt.query_norm), txt)
    assert relative_l2(q[:, :3], expected.float()) < 0.04


@pytest.mark.parametrize("moved", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["random", "one row", "one column", "one scale", "plain"])
def test_v_stays_below_its_bound(kind: str, moved: float) -> None:
    """For tokens in the worst direction as well, which reach it; for others, it is not a hundred times too large."""
    source = value_source(5, gain=0.03, moved=moved)
    if kind == "one row":
        source.weight_scale[7] *= 50
    elif kind == "one column":
        source.scale[0, 3] = 80
    elif kind == "one scale":
        source = source._replace(weight_scale=source.weight_scale[:1].clone().reshape(1))
    elif kind == "plain":
        source = source._replace(weight=source.weight.float() * source.weight_scale, weight_scale=None)
    matrix = source.weight.float() * (1 if source.weight_scale is None else source.weight_scale)
    bound = float(source.bound())
    worst = torch.stack([matrix * (1 + scale) for scale in source.scale])
    largest = max(float(values(source, x).abs().max()) for x in (worst, -worst))
    assert largest <= bound
    assert largest > bound / 3, "the worst direction is far from it"
    assert bound / 100 < float(values(source, normal(2, 256, WIDTH)).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_segments(dtype: torch.dtype) -> None:
    q, k, v = (normal(2, 40, HEADS, DIM, seed=s).to(dtype) for s in range(3))
    seen = attention_function(Attention.FP8)(q, k, v * 30)
    assert (seen.dtype, seen.shape) == (dtype, (2, 40, HEADS * DIM))
    assert relative_l2(seen, attend(q.float(), k.float(), v.float() * 30)) < 0.08


@pytest.mark.parametrize("name", FP8_LAYERS)
@pytest.mark.parametrize("static", [False, True])
def test_whole_blocks(name: SegmentName, static: bool) -> None:
    """Compiled as Inductor would see it, with and without FP8 layers after attention: off by rounding, not by more."""
    arch = FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer(double=1, single=1, head_dim=16))))
    for layers in (frozenset(), frozenset(FP8_LAYERS[name])):
        precision = Precision(layers, static=static) if layers else Precision()
        described = segment(name, arch, attend_fp8, precision)
        inputs = described.random_inputs(2, 24, 8, torch.float32, CPU)
        expected = segment(name, arch, attend, precision).function(*inputs)
        seen = torch.compile(described.function, backend="eager", fullgraph=True)(*inputs)
        eager = described.function(*inputs)
        assert all(torch.equal(s, r) for s, r in zip(seen, eager, strict=True))
        for s, e in zip(added(seen), added(expected), strict=True):
            assert 1e-4 < relative_l2(s, e) < 0.03


def test_the_noise_of_logits_is_what_rounding_does() -> None:
    """Predicted from the norms' weights alone, measured with random directions of q and k."""
    for gain in (1.0, 3.0):
        norms = [gain * (1 + 0.2 * normal(128, seed=s)) for s in (1, 2)]
        q, k = (normal(4096, 128, seed=s + 3) * norms[s] for s in (0, 1))
        exact_logits = (q * k).sum(-1) / 128**0.5
        rounded = (q.to(FP8).float() * k.to(FP8).float()).sum(-1) / 128**0.5
        measured = (rounded - exact_logits).square().mean().sqrt()
        assert float(logit_noise(*norms)) == pytest.approx(float(measured), rel=0.1)


def test_the_package_may_have_any_name(tmp_path: Path) -> None:
    """ComfyUI imports a pack under its folder's path, also beside the library itself."""
    code = (
        "import importlib.util, sys\n"
        f"name, place = '/models/custom_nodes/trt-lora flux', {str(Path(trt_core.__file__))!r}\n"
        "spec = importlib.util.spec_from_file_location(name, place, submodule_search_locations=[place[:-12]])\n"
        "sys.modules[name] = importlib.util.module_from_spec(spec)\n"
        "for package in (name, 'trt_core'):\n"
        "    found = importlib.import_module(package + '.flux.fp8_attention')\n"
        "    x = found.torch.ones(1, 2, 1, 4).to(found.FP8)\n"
        "    assert found._OPERATOR(x, x, x, found.torch.ones(1)).shape == x.shape\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(trt_core.__file__).parents[1])
