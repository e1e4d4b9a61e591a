"""The segments of one architecture: function, argument names, shapes, and which axes vary from call to call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..config import Profile, ShapeRange
from . import fp8, segments, weights
from .architecture import FluxArchitecture
from .precision import FP8, INPUT_SCALE, PLAIN, SCALE, Bound, Precision


class Axis(Enum):
    """An axis whose size changes from call to call."""

    BATCH = "batch"
    IMG = "img_tokens"
    TXT = "txt_tokens"
    ALL = "all_tokens"
    """Text and image tokens together."""


class BlockKind(Enum):
    DOUBLE = "double"
    SINGLE = "single"


class SegmentName(Enum):
    DOUBLE_QKV = "double_qkv"
    DOUBLE_OUT = "double_out"
    DOUBLE_BLOCK = "double_block"
    SINGLE_QKV_MLP = "single_qkv_mlp"
    SINGLE_OUT = "single_out"
    SINGLE_BLOCK = "single_block"

    @property
    def kind(self) -> BlockKind:
        return BlockKind.DOUBLE if self.value.startswith(BlockKind.DOUBLE.value) else BlockKind.SINGLE


SPLIT_SEGMENTS: Mapping[BlockKind, tuple[SegmentName, SegmentName]] = {
    BlockKind.DOUBLE: (SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT),
    BlockKind.SINGLE: (SegmentName.SINGLE_QKV_MLP, SegmentName.SINGLE_OUT),
}
"""A block's halves, before and after attention."""

Dim = int | Axis


@dataclass(frozen=True, slots=True)
class Argument:
    """One activation of a segment: its name, its shape, and whether it is fp32 whatever the model's dtype is."""

    name: str
    shape: tuple[Dim, ...]
    fp32: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A pure function of activations and weights, with all that a backend needs to compile it.

    `function(*activations, *weights)` returns a tuple of tensors; `weights` are tensors of a block, by name inside it,
    in the order of the function's arguments, FP8 matrices each followed by their scales.
    """

    name: SegmentName
    function: Callable[..., tuple[Tensor, ...]]
    activations: tuple[Argument, ...]
    weights: tuple[Bound, ...]

    def sizes(self, batch: int, img_tokens: int, txt_tokens: int) -> list[tuple[int, ...]]:
        """Concrete shapes of the activations for one call."""
        size = {
            Axis.BATCH: batch,
            Axis.IMG: img_tokens,
            Axis.TXT: txt_tokens,
            Axis.ALL: img_tokens + txt_tokens,
        }
        return [tuple(size[d] if isinstance(d, Axis) else d for d in a.shape) for a in self.activations]

    def random_inputs(
        self,
        batch: int,
        img_tokens: int,
        txt_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        weights: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Activations and weights with random numbers at the scale of a trained model, for building and checking.

        `weights` are taken as they are where they are given: those of a double block alone take 0.45 GB.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def normal(shape: tuple[int, ...], std: float, kind: torch.dtype) -> Tensor:
            # Drawn in the target dtype: an fp32 draft of FLUX's linear1 alone would take 264 MB more.
            return torch.randn(shape, generator=generator, device=device, dtype=kind).mul_(std)

        sizes = self.sizes(batch, img_tokens, txt_tokens)
        inputs = []
        for argument, shape in zip(self.activations, sizes, strict=True):
            if argument.name.endswith(("cos", "sin")):
                angle = normal(shape, 3.0, torch.float32)
                inputs.append(angle.cos() if argument.name.endswith("cos") else angle.sin())
            else:
                inputs.append(normal(shape, 0.3 if argument.name.endswith(("mod", "gate")) else 1.0, dtype))
        if weights:
            return [*inputs, *weights]
        for weight in self.weights:
            inputs.append(_random_weight(weight, normal, dtype, inputs[-1] if inputs else None))
        return inputs


def _random_weight(weight: Bound, normal: Callable[..., Tensor], dtype: torch.dtype, before: Tensor) -> Tensor:
    """Numbers at the scale of a trained model. `before`: the input before it, whose scale this one may be."""
    name, shape = weight.name, weight.shape
    if name.endswith(f".{SCALE}"):
        # Rows of FP8 numbers as quantization leaves them: the largest at the end of the range.
        return torch.full(shape, before.shape[1] ** -0.5 * _LARGEST_SIGMA / fp8.FP8_MAX, device=before.device)
    if name.endswith(f".{INPUT_SCALE}"):
        return torch.full(shape, _LARGEST_ACTIVATION / fp8.FP8_MAX, device=before.device)
    if weight.dtype is FP8:
        return normal(shape, fp8.FP8_MAX / _LARGEST_SIGMA, dtype).clamp_(-fp8.FP8_MAX, fp8.FP8_MAX).to(FP8)
    if name.endswith("norm.scale"):
        return normal(shape, 0.2, dtype).add_(1.0)
    return normal(shape, shape[1] ** -0.5 if len(shape) == 2 else 0.1, dtype)


_LARGEST_SIGMA = 4.5
"""The largest of 3072 to 15360 normal numbers, in standard deviations."""
_LARGEST_ACTIVATION = 24.0
"""Beyond what random activations reach in any layer, so that nothing is clamped."""


def axis_range(profile: Profile, axis: Axis) -> ShapeRange:
    """The range of one axis in a profile; text and image ranges add up where both are on one axis."""
    if axis is Axis.BATCH:
        return profile.batch
    if axis is Axis.IMG:
        return profile.img_tokens
    if axis is Axis.TXT:
        return profile.txt_tokens
    img, txt = profile.img_tokens, profile.txt_tokens
    return ShapeRange(img.min + txt.min, img.opt + txt.opt, img.max + txt.max)


@lru_cache(maxsize=1)
def source_version() -> str:
    """Digest of this package's code, which defines the segments: part of every engine's cache key."""
    text = "".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def segment(
    name: SegmentName,
    arch: FluxArchitecture,
    attention: segments.AttentionFunction | None = None,
    precision: Precision = PLAIN,
    beside: segments.BesideAttention | None = None,
) -> Segment:
    """The named segment for one architecture. Whole blocks need the `attention` to put inside; `beside` is the same."""
    hidden, head, mlp = arch.hidden, arch.head_dim, arch.mlp_hidden
    img, txt = (Axis.BATCH, Axis.IMG, hidden), (Axis.BATCH, Axis.TXT, hidden)
    x = (Axis.BATCH, Axis.ALL, hidden)
    mods = (Argument("img_mod", (6, Axis.BATCH, hidden)), Argument("txt_mod", (6, Axis.BATCH, hidden)))
    mod = Argument("mod", (3, Axis.BATCH, hidden))
    double_pe = tuple(
        Argument(f"{stream}_{part}", (axis, head // 2), fp32=True)
        for stream, axis in (("img", Axis.IMG), ("txt", Axis.TXT))
        for part in ("cos", "sin")
    )
    single_pe = (
        Argument("cos", (Axis.ALL, head // 2), fp32=True),
        Argument("sin", (Axis.ALL, head // 2), fp32=True),
    )
    double_in = (Argument("img", img), Argument("txt", txt), *mods, *double_pe)
    single_in = (Argument("x", x), mod, *single_pe)
    gate = (Axis.BATCH, hidden)
    double_open = tuple(
        Argument(f"{stream}{part}", gate if part == "_gate" else shape)
        for stream, shape in (("img", img), ("txt", txt))
        for part in ("", "_add", "_gate")
    )
    single_open = (Argument("x", x), Argument("x_add", x), Argument("x_gate", gate))
    wide = (Axis.BATCH, Axis.ALL, 3 * hidden + mlp)
    table = {
        SegmentName.DOUBLE_QKV: (segments.double_qkv, double_in, weights.DOUBLE_QKV),
        SegmentName.DOUBLE_OUT: (
            segments.double_out,
            (
                Argument("img", img),
                Argument("txt", txt),
                Argument("img_attn", img),
                Argument("txt_attn", txt),
                *mods,
            ),
            weights.DOUBLE_OUT,
        ),
        SegmentName.SINGLE_QKV_MLP: (segments.single_qkv_mlp, single_in, weights.SINGLE_QKV_MLP),
        SegmentName.SINGLE_OUT: (
            segments.single_out,
            (Argument("x", x), Argument("attn", x), Argument("wide", wide), mod),
            weights.SINGLE_OUT,
        ),
    }
    if attention is not None:
        table[SegmentName.DOUBLE_BLOCK] = (
            segments.double_block(attention), (*double_open, *mods, *double_pe),
            weights.DOUBLE_QKV + weights.DOUBLE_OUT,
        )  # fmt: skip
        table[SegmentName.SINGLE_BLOCK] = (
            segments.single_block(attention, beside), (*single_open, mod, *single_pe),
            weights.SINGLE_QKV_MLP + weights.SINGLE_OUT,
        )  # fmt: skip
    function, activations, names = table[name]
    shapes = weights.double_block_shapes(arch) | weights.single_block_shapes(arch)
    if precision.fp8:
        function = _grouping(function, len(activations), names, precision)
    return Segment(name, function, activations, precision.bound(names, shapes))


def _grouping(
    function: Callable[..., tuple[Tensor, ...]], activations: int, names: tuple[str, ...], precision: Precision
) -> Callable[..., tuple[Tensor, ...]]:
    """`function` taking tensors only: FP8 matrices and their scales are put together again."""

    def grouped(*tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors[:activations], *precision.grouped(names, tensors[activations:]))

    return grouped
