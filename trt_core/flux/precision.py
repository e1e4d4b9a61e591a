"""Which linear layers of a block are FP8, and the names, shapes and dtypes of the tensors that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .fp8 import FP8
from .linear import Fp8Weight, Weight

SCALE, INPUT_SCALE = "weight_scale", "input_scale"
"""Names that ComfyUI's scaled FP8 checkpoints use, beside "weight"."""
CORRECTED_BIAS = "corrected_bias"
"""What an FP8 layer whose mean input is known reads in place of its "bias"."""


@dataclass(frozen=True, slots=True)
class Bound:
    """One weight input of a segment: its name inside the block, its shape, and its dtype (None: the model's)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Precision:
    """The FP8 layers of one kind of block by local name ("img_attn.qkv"); without any, the model's own dtype.

    `per_row`: a scale per output channel and per token, else one for the whole tensor. `static`: the activations'
    scales come from calibration and are inputs, too; else each call finds them. `fp8_attention`: attention may be in
    E4M3, too, because the norms of q and k leave logits exact enough; whether it is, the plan says. `wide`: FP8 is
    storage alone, products are in the model's dtype (`linear.Fp8Weight`); the plan says so where they are faster.
    """

    fp8: frozenset[str] = frozenset()
    per_row: bool = True
    static: bool = False
    fp8_attention: bool = False
    wide: bool = False

    def bound(self, names: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> tuple[Bound, ...]:
        """Every weight input for the plain weights `names`: an FP8 weight is followed by its scales."""
        return tuple(item for name in names for item in self._bound(name, shapes[name]))

    def inputs(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names of `bound` alone."""
        return tuple(item for name in names for item in (name, *self._scales(name)))

    def grouped(self, names: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[Weight]:
        """One item per plain weight: the tensor itself, or an FP8 weight with its scales."""
        rest = iter(tensors)
        for name in names:
            weight, scales = next(rest), [next(rest) for _ in self._scales(name)]
            if scales:
                yield Fp8Weight(weight, scales[0], scales[1] if self.static else None, self.wide)
            else:
                yield weight

    def is_fp8(self, name: str) -> bool:
        """Whether `name` ("img_attn.qkv.weight") is the matrix of an FP8 layer."""
        layer, _, kind = name.rpartition(".")
        return kind == "weight" and layer in self.fp8

    def _bound(self, name: str, shape: tuple[int, ...]) -> Iterator[Bound]:
        if not self.is_fp8(name):
            yield Bound(name, shape)
            return
        yield Bound(name, shape, FP8)
        scale, *input_scale = self._scales(name)
        yield Bound(scale, (shape[0], 1) if self.per_row else (1,), torch.float32)
        for extra in input_scale:
            yield Bound(extra, (1,), torch.float32)

    def _scales(self, name: str) -> tuple[str, ...]:
        if not self.is_fp8(name):
            return ()
        layer = name.removesuffix("weight")
        return (layer + SCALE, layer + INPUT_SCALE) if self.static else (layer + SCALE,)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON's kinds of values, for cache keys and builder processes."""
        return {**asdict(self), "fp8": sorted(self.fp8)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Precision:
        return cls(**{**fields, "fp8": frozenset(fields["fp8"])})

    def words(self) -> str:
        """ "fp8 per row, dynamic" or "bf16" for log and node; the caller names another dtype itself."""
        if not self.fp8:
            return ""
        return f"fp8 per {'row' if self.per_row else 'tensor'}, {'static' if self.static else 'dynamic'}"


PLAIN = Precision()
"""Every layer in the model's own dtype."""
