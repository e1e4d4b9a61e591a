"""What bound weights have in common of which some are FP8, wherever their FP8 numbers come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .flux import fp8, storage
from .flux.branches import Branches
from .flux.precision import CORRECTED_BIAS, INPUT_SCALE, SCALE
from .fp8_recipe import Fp8Recipe, Granularity, is_modulation
from .low_rank import Span, low_rank_spans
from .weights import BoundWeights, Patches, WeightPatches

_MADE = (SCALE, INPUT_SCALE, CORRECTED_BIAS)
MAX_BRANCH_RANK = 128
"""Of all LoRAs on one modulation together. At 128 they take 0.4 GB beside FLUX.1-dev; more are merged."""


class QuantizedWeights(BoundWeights):
    """Matrices of eight bits, each beside its scale, and everything else as it is. Where bases are, subclasses know.

    LoRAs are merged into FP8 matrices, and applied beside the matrices of modulations (`Branches`), exact or stored,
    whose bits stay the base's; what is no low-rank product (DoRA, LoKr, LoHa) is merged there, too.
    """

    _recipe: Fp8Recipe
    _dtype: torch.dtype
    """What blocks compute in."""
    _matrices: Collection[str]
    """Names of the matrices of eight bits."""
    _branches: Branches | None = None

    @property
    def branches(self) -> Branches | None:
        return self._branches

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def base_names(self) -> list[str]:
        """BFL names of the weights as they were given, without what was made beside them."""
        return [name for name in self.tensors if name.rpartition(".")[2] not in _MADE]

    def readable(self, name: str) -> Tensor | None:
        delta = None if self._branches is None else self._branches.delta(layer_of(name))
        if name not in self._matrices:
            value = super().readable(name)
            return value if value is None or delta is None else (value.float() + delta).to(self._dtype)
        weight, scale = self._bound(name)
        if delta is None:
            return storage.dequantize(weight, scale, self._dtype)
        return (storage.dequantize(weight, scale, torch.float32) + delta).to(self._dtype)

    def outlines(self) -> dict[str, Tensor]:
        """What stands for the weights where only shape and dtype count: nothing is widened or read for it."""
        return {name: self._outline(name) if name in self._matrices else self.tensors[name] for name in self.base_names}

    def _outline(self, name: str) -> Tensor:
        return torch.empty(self.tensors[name].shape, dtype=self._dtype, device="meta")

    @property
    def _per_row(self) -> bool:
        return self._recipe.config.granularity is Granularity.ROW

    def _bound(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[name], self.tensors[scale_name(name)]

    def _input_scale(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The bound scale of a matrix's input, where it is static."""
        layer = layer_of(name)
        if layer not in self._recipe.input_amax:
            return {}
        return {f"{layer}.{INPUT_SCALE}": torch.full((1,), self._recipe.input_scale(layer), device=device)}

    def _quantize(self, value: Tensor, out: tuple[Tensor, Tensor]) -> None:
        if out[0].dtype is storage.INT8:
            storage.quantize(value, out)
        else:
            fp8.merge_quantize(value, None, 1.0, out, per_row=self._per_row)

    def _to_merge(self, name: str, patches: Patches) -> Patches:
        return patches if self._spans(name, patches) is None else ()

    def _spans(self, name: str, patches: Patches) -> list[Span] | None:
        """What is applied beside this weight; None where patches are merged into it."""
        if not self._recipe.quantizes(name) or not is_modulation(layer_of(name)):
            return None
        spans = low_rank_spans(self.tensors[name].shape, patches)
        return spans if spans is not None and _rank(spans) <= MAX_BRANCH_RANK else None

    def _apply_beside(self, new: Mapping[str, WeightPatches], changed: Collection[str]) -> None:
        found = {name: self._spans(name, patches.patches) for name, patches in new.items()}
        beside = {layer_of(name): spans for name, spans in found.items() if spans}
        shapes = {
            layer: (*self.tensors[f"{layer}.weight"].shape, _rank(spans)) for layer, spans in sorted(beside.items())
        }
        if not shapes:
            self._branches = None
            return
        if self._branches is None or self._branches.shapes != shapes:
            self._branches, changed = Branches.empty(shapes, self._dtype, self.device), new.keys()
        _fill(self._branches, {layer: spans for layer, spans in beside.items() if f"{layer}.weight" in changed})

    def _put(self, name: str, value: Tensor) -> None:
        if name not in self._matrices:
            super()._put(name, value)
            return
        bound = self._bound(name)
        weight, scale = (torch.empty_like(tensor, device="cpu") for tensor in bound)
        self._quantize(value, (weight, scale))
        bound[0].copy_(weight)
        bound[1].copy_(scale)


def _fill(branches: Branches, changed: Mapping[str, Sequence[Span]]) -> None:
    """Writes these layers' factors, all at once: a LoRA on all of FLUX.1-dev has 152 of them."""
    ups: list[tuple[Tensor, Tensor]] = []
    downs: list[tuple[Tensor, Tensor]] = []
    factors: list[float] = []
    for layer, spans in changed.items():
        branch = branches.layers[layer]
        place = 0
        if any(stop - start < branch.up.shape[0] for start, stop, _ in spans):
            branch.up.zero_()
        for start, stop, (up, down, factor) in spans:
            following = place + up.shape[1]
            ups.append((branch.up[start:stop, place:following], up))
            downs.append((branches.down[branch.start + place : branch.start + following], down))
            factors.append(factor)
            place = following
    if factors:
        for pairs in (ups, downs):
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)), non_blocking=True)
        torch._foreach_mul_([written for written, _ in downs], factors)


def _rank(spans: Sequence[Span]) -> int:
    return sum(span.term.up.shape[1] for span in spans)


def layer_of(name: str) -> str:
    """The layer of a matrix, "double_blocks.0.img_attn.qkv"."""
    return name.removesuffix(".weight")


def scale_name(name: str) -> str:
    """The name of a quantized matrix's scale."""
    return f"{name.removesuffix('weight')}{SCALE}"
