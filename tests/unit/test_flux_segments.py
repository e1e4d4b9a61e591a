"""Segments by themselves: both cuts of a block agree, shapes are as the catalogue says, RoPE is diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from tests.unit.tiny_flux import bfl_weights, shapes_of, tiny_transformer
from trt_core.backends.check import relative_l2
from trt_core.config import Attention, Profile, ShapeRange, image_tokens
from trt_core.errors import InvalidOption
from trt_core.flux import flash3_attention
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.attention import attend, attention_function, runnable_kernels
from trt_core.flux.catalogue import Axis, SegmentName, axis_range, segment
from trt_core.flux.open_sum import OpenSum, closed, opened
from trt_core.flux.rope import rope_cos_sin, rotate
from trt_core.flux.segments import value_of
from trt_core.flux.stem import timestep_embedding

ARCH = FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer())))
BATCH, IMG, TXT = 2, 12, 5
CPU = torch.device("cpu")


def inputs_of(name: SegmentName, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return segment(name, ARCH, attend).random_inputs(BATCH, IMG, TXT, dtype, CPU)


@pytest.mark.parametrize("name", SegmentName)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_inputs_fit_the_function(name: SegmentName, dtype: torch.dtype) -> None:
    described = segment(name, ARCH, attend)
    inputs = inputs_of(name, dtype)
    outputs = described.function(*inputs)
    fp32 = [argument.fp32 for argument in described.activations] + [False] * len(described.weights)
    assert [t.dtype for t in inputs] == [torch.float32 if wide else dtype for wide in fp32]
    assert all(out.dtype is dtype and out.isfinite().all() for out in outputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, inputs_of(name, dtype), strict=True)), "not repeatable"


@pytest.mark.parametrize("name", SegmentName)
def test_every_argument_matters(name: SegmentName) -> None:
    """A weight or activation that a segment takes but does not read could be wrong and nobody would see it."""
    function, inputs = segment(name, ARCH, attend).function, inputs_of(name)
    before = function(*inputs)
    for index in range(len(inputs)):
        changed = list(inputs)
        changed[index] = 1.3 * inputs[index].roll(1, -1)
        after = function(*changed)
        assert max(relative_l2(a, b) for a, b in zip(after, before, strict=True)) > 1e-4, index


def test_a_split_double_block_is_the_whole_one() -> None:
    inputs = inputs_of(SegmentName.DOUBLE_BLOCK)
    img, txt = OpenSum(*inputs[:3]).closed(), OpenSum(*inputs[3:6]).closed()
    img_mod, txt_mod = inputs[6:8]
    q, k, v = segment(SegmentName.DOUBLE_QKV, ARCH).function(img, txt, *inputs[6:20])
    attn = attend(q, k, v)
    halves = segment(SegmentName.DOUBLE_OUT, ARCH).function(
        img, txt, attn[:, TXT:], attn[:, :TXT], img_mod, txt_mod, *inputs[20:]
    )
    whole = segment(SegmentName.DOUBLE_BLOCK, ARCH, attend).function(*inputs)
    sums = (OpenSum(*whole[:2], img_mod[5]), OpenSum(*whole[2:], txt_mod[5]))
    assert all(torch.equal(a, b.closed()) for a, b in zip(halves, sums, strict=True))


def test_a_split_single_block_is_the_whole_one() -> None:
    inputs = inputs_of(SegmentName.SINGLE_BLOCK)
    x, mod = OpenSum(*inputs[:3]).closed(), inputs[3]
    q, k, wide = segment(SegmentName.SINGLE_QKV_MLP, ARCH).function(x, *inputs[3:10])
    attn = attend(q, k, value_of(wide, q))
    half = segment(SegmentName.SINGLE_OUT, ARCH).function(x, attn, wide, mod, *inputs[10:])
    whole = segment(SegmentName.SINGLE_BLOCK, ARCH, attend).function(*inputs)
    assert torch.equal(half[0], OpenSum(*whole, mod[2]).closed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_open_sums(dtype: torch.dtype) -> None:
    """Closed they are x + gate * add, rounded once; a tensor that is opened stays what it is."""
    x, add, gate = (torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(dtype)
                    for n, shape in enumerate(((2, 5, 48), (2, 5, 48), (2, 48))))  # fmt: skip
    eps = torch.finfo(dtype).eps
    expected = (x.double() + gate[:, None].double() * add.double()).to(dtype)
    assert torch.allclose(OpenSum(x, add, gate).closed(), expected, rtol=eps, atol=eps)
    mod = torch.full((3, 2, 48), torch.nan, dtype=dtype)
    stream = opened(x, mod)
    assert torch.equal(stream.closed(), x)
    assert opened(stream, mod) is stream
    assert closed(x) is x


def test_weights_of_the_two_cuts_are_the_same() -> None:
    for whole, halves in (
        (SegmentName.DOUBLE_BLOCK, (SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT)),
        (SegmentName.SINGLE_BLOCK, (SegmentName.SINGLE_QKV_MLP, SegmentName.SINGLE_OUT)),
    ):
        parts = [segment(name, ARCH) for name in halves]
        assert segment(whole, ARCH, attend).weights == parts[0].weights + parts[1].weights


def test_whole_blocks_need_attention() -> None:
    with pytest.raises(KeyError):
        segment(SegmentName.DOUBLE_BLOCK, ARCH)


def test_rope_is_diffusers() -> None:
    ids = torch.stack((torch.arange(9) % 2, torch.arange(9) * 3, 200 - torch.arange(9) * 7), dim=1).float()
    cos, sin = rope_cos_sin(ids, ARCH.axes_dim, ARCH.theta)
    their_cos, their_sin = FluxPosEmbed(theta=10000, axes_dim=list(ARCH.axes_dim))(ids)
    assert cos.dtype is torch.float32
    assert torch.equal(cos.repeat_interleave(2, -1), their_cos)
    assert torch.equal(sin.repeat_interleave(2, -1), their_sin)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, ARCH.head_dim, generator=random)
    rotated = []
    for q_at, k_at in ((3, 7), (10, 14)):
        tables = [rope_cos_sin(torch.tensor([[0.0, at, 2 * at]]), ARCH.axes_dim) for at in (q_at, k_at)]
        rotated.append((rotate(q, *tables[0]), rotate(k, *tables[1])))
    dots = [float((a * b).sum()) for a, b in rotated]
    assert dots[0] == pytest.approx(dots[1], rel=1e-4)
    assert dots[0] != pytest.approx(float((q * k).sum()), rel=1e-2)
    assert float(rotated[0][0].norm()) == pytest.approx(float(q.norm()), rel=1e-5)


def test_timestep_embedding_is_diffusers() -> None:
    from diffusers.models.embeddings import Timesteps

    t = torch.tensor([0.0, 1.0, 437.5, 1000.0])
    theirs = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)(t)
    assert torch.allclose(timestep_embedding(t), theirs, atol=1e-6)


def test_only_fp16_is_clamped() -> None:
    inputs = inputs_of(SegmentName.SINGLE_OUT, torch.float16)
    inputs[0][...] = 60000.0
    inputs[-1][...] = 30000.0
    inputs[3][...] = 1.0
    out = segment(SegmentName.SINGLE_OUT, ARCH).function(*inputs)[0]
    assert out.isfinite().all()
    assert out.max() == 65504
    wide = segment(SegmentName.SINGLE_OUT, ARCH).function(*(t.float() for t in inputs))[0]
    assert wide.max() > 80000


def test_a_cpu_has_one_attention_kernel() -> None:
    assert runnable_kernels(torch.bfloat16, CPU, 2, 32) == [Attention.AUTO]


def test_math_attention_equals_the_general_one() -> None:
    q, k, v = torch.randn(3, 2, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    assert relative_l2(attention_function(Attention.FLASH3)(q, k, v), attend(q, k, v)) < 1e-6
    assert relative_l2(attention_function(Attention.MATH)(q, k, v), attend(q, k, v)) < 1e-6
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    assert relative_l2(attend(q, k, v, mask), attend(q, k, v)) > 0.01


def test_ranges_of_text_and_image_add_up() -> None:
    profile = Profile(ShapeRange(256, 4096, 16384), ShapeRange(1, 512, 1024), ShapeRange(1, 1, 4))
    assert axis_range(profile, Axis.ALL) == ShapeRange(257, 4608, 17408)
    assert axis_range(profile, Axis.IMG) == profile.img_tokens
    assert axis_range(profile, Axis.TXT) == profile.txt_tokens
    assert axis_range(profile, Axis.BATCH) == profile.batch


def test_profiles_grow_and_hold() -> None:
    profile = Profile.around(1, 4096, 512)
    assert profile.holds(4, 256, 1)
    assert profile.holds(1, 16384, 1024)
    assert not profile.holds(1, 16385, 512)
    assert not profile.holds(5, 4096, 512)
    wider = profile.widened(5, 20000, 512)
    assert wider.holds(5, 20000, 512)
    assert wider.holds(1, 256, 1)
    assert wider.img_tokens.opt == 20000


@pytest.mark.parametrize(("side_px", "fix_px"), [(1000, 992), (1017, 1024), (7, 16), (0, 16), (-32, 16)])
def test_sizes_that_are_no_multiple_of_16_are_refused_with_the_nearest(side_px: int, fix_px: int) -> None:
    with pytest.raises(InvalidOption, match=f"width is {side_px} px.*multiples of 16 px. Use {fix_px} px"):
        image_tokens(1024, side_px)


def test_image_tokens() -> None:
    assert image_tokens(1024, 1024) == 4096
    assert image_tokens(1344, 768) == 84 * 48


@pytest.mark.parametrize("bounds", [(0, 1, 2), (3, 2, 4), (1, 5, 4)])
def test_ranges_must_be_in_order(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidOption, match="min <= opt <= max"):
        ShapeRange(*bounds)


def test_flash_attention_3_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, bf16 = torch.device("cuda", 0), torch.bfloat16
    assert "NVIDIA GPU" in str(flash3_attention.why_not(bf16, CPU, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert "this GPU has 12.0" in str(flash3_attention.why_not(bf16, cuda, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "no kernel for heads of 80" in str(flash3_attention.why_not(bf16, cuda, 80))
    assert "float16" in str(flash3_attention.why_not(torch.float16, cuda, 128))
    assert "pip install fa3-fwd" in str(flash3_attention.why_not(bf16, cuda, 128))
