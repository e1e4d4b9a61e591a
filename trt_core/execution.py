"""Runs one block the way its plan says: compiled segments with attention between them or inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .backends.base import CompiledSegment
from .errors import BuildFailed
from .flux.attention import attend
from .flux.open_sum import OpenSum, Stream, closed, opened
from .flux.segments import AttentionFunction, value_of


@dataclass(frozen=True, slots=True)
class Pe:
    """RoPE's cos and sin, [tokens, head_dim / 2] in fp32: for all tokens, and views for text and image alone."""

    cos: Tensor
    sin: Tensor
    txt_tokens: int

    @property
    def double(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """img_cos, img_sin, txt_cos, txt_sin, as the double block's segments take them."""
        n = self.txt_tokens
        return self.cos[n:], self.sin[n:], self.cos[:n], self.sin[:n]


class BlockWeights(NamedTuple):
    """One block's weights in the order of its segments' arguments: those before attention, and those after."""

    before: Sequence[Tensor]
    after: Sequence[Tensor]


class DoubleBlock(Protocol):
    """(img, txt, img_mod, txt_mod, pe, weights) to (img, txt). Takes sums that are open, and may leave some."""

    takes_mask: bool

    def __call__(
        self, img: Stream, txt: Stream, img_mod: Tensor, txt_mod: Tensor, pe: Pe, weights: BlockWeights,
        mask: Tensor | None = None,
    ) -> tuple[Stream, Stream]: ...  # fmt: skip


class SingleBlock(Protocol):
    """(x, mod, pe, weights) to x, with sums as in `DoubleBlock`."""

    takes_mask: bool

    def __call__(self, x: Stream, mod: Tensor, pe: Pe, weights: BlockWeights, mask: Tensor | None = None) -> Stream: ...


class SplitDouble:
    takes_mask = True

    def __init__(self, qkv: CompiledSegment, out: CompiledSegment, attention: AttentionFunction) -> None:
        self._qkv, self._out, self._attention = qkv, out, attention

    def __call__(
        self, img: Stream, txt: Stream, img_mod: Tensor, txt_mod: Tensor, pe: Pe, weights: BlockWeights,
        mask: Tensor | None = None,
    ) -> tuple[Stream, Stream]:  # fmt: skip
        img, txt = closed(img), closed(txt)
        q, k, v = self._qkv(img, txt, img_mod, txt_mod, *pe.double, *weights.before)
        attn = self._attention(q, k, v) if mask is None else attend(q, k, v, mask)
        n = txt.shape[1]
        img, txt = self._out(img, txt, attn[:, n:], attn[:, :n], img_mod, txt_mod, *weights.after)
        return img, txt


class SplitSingle:
    takes_mask = True

    def __init__(self, qkv_mlp: CompiledSegment, out: CompiledSegment, attention: AttentionFunction) -> None:
        self._qkv_mlp, self._out, self._attention = qkv_mlp, out, attention

    def __call__(self, x: Stream, mod: Tensor, pe: Pe, weights: BlockWeights, mask: Tensor | None = None) -> Stream:
        x = closed(x)
        q, k, wide = self._qkv_mlp(x, mod, pe.cos, pe.sin, *weights.before)
        v = value_of(wide, q)
        attn = self._attention(q, k, v) if mask is None else attend(q, k, v, mask)
        return self._out(x, attn, wide, mod, *weights.after)[0]


class WholeDouble:
    takes_mask = False

    def __init__(self, block: CompiledSegment) -> None:
        self._block = block

    def __call__(
        self, img: Stream, txt: Stream, img_mod: Tensor, txt_mod: Tensor, pe: Pe, weights: BlockWeights,
        mask: Tensor | None = None,
    ) -> tuple[Stream, Stream]:  # fmt: skip
        _refuse_mask(mask)
        streams = (*opened(img, img_mod), *opened(txt, txt_mod))
        both = self._block(*streams, img_mod, txt_mod, *pe.double, *weights.before, *weights.after)
        return OpenSum(*both[:2], img_mod[-1]), OpenSum(*both[2:], txt_mod[-1])


class WholeSingle:
    takes_mask = False

    def __init__(self, block: CompiledSegment) -> None:
        self._block = block

    def __call__(self, x: Stream, mod: Tensor, pe: Pe, weights: BlockWeights, mask: Tensor | None = None) -> Stream:
        _refuse_mask(mask)
        parts = self._block(*opened(x, mod), mod, pe.cos, pe.sin, *weights.before, *weights.after)
        return OpenSum(*parts, mod[-1])


def _refuse_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise BuildFailed("This block was compiled with attention inside and takes no attention mask.")
