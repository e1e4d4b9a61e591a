"""What rounding a weight takes from its layer's mean output, given back by the bias.

A product with rounded weights W8 errs by (W - W8) @ x. The mean of that over tokens, (W - W8) @ mean(x), is the same at
every step, so it adds up where errors of inputs average out. Where the mean input is known from calibration, the bias
takes it back, which costs nothing at run time (Nagel et al. 2019, arXiv:1906.04721, section 4.2; Finkelstein et al.
2019, arXiv:1906.03193).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .flux import fp8
from .flux.precision import CORRECTED_BIAS

_ROWS_AT_ONCE = 2048
"""In fp32 a whole linear1 of FLUX.1-dev would take 0.8 GB for a moment."""


class BiasCorrection:
    """Corrections of one binding by layer ("double_blocks.0.img_attn.qkv"), fp32 [N] each, anew at every merge."""

    def __init__(self, means: Mapping[str, Tensor], device: torch.device) -> None:
        """`means`: mean inputs, fp32 [K]; layers without one are not corrected."""
        self._means = {layer: mean.to(device) for layer, mean in means.items()}
        self._lost: dict[str, Tensor] = {}
        self._lost_of_base: dict[str, Tensor] = {}
        """Kept: sums of another device or kernel have other last bits."""

    def new_bias(self, layer: str, weight: Tensor) -> dict[str, Tensor]:
        """The bound tensor that blocks read in place of the layer's bias, not yet written; empty without a mean."""
        if layer not in self._means:
            return {}
        mean, rows = self._means[layer], weight.shape[0]
        self._lost[layer] = torch.zeros(rows, dtype=torch.float32, device=mean.device)
        return {f"{layer}.{CORRECTED_BIAS}": torch.empty(rows, dtype=weight.dtype, device=mean.device)}

    def of(self, layer: str) -> tuple[Tensor, Tensor] | tuple[()]:
        """A layer's mean and its correction, which merges write; () where it is not corrected."""
        return (self._means[layer], self._lost[layer]) if layer in self._means else ()

    def note(self, layer: str, value: Tensor, weight: Tensor, scale: Tensor) -> None:
        """Makes the correction of a layer whose `value` [N, K] became `weight` (E4M3) with its scale, on one device."""
        if layer not in self._means:
            return
        mean, scales = self._means[layer].to(value.device), scale.expand(weight.shape[0], 1)
        parts = zip(*(x.split(_ROWS_AT_ONCE) for x in (self._lost[layer], value, weight, scales)), strict=True)
        for lost, exact, rounded, its_scale in parts:
            lost.copy_((exact.float() - fp8.dequantize(rounded, its_scale, torch.float32)) @ mean)

    def note_base(self, layer: str, value: Tensor, weight: Tensor, scale: Tensor) -> None:
        """As `note` for a base, whose correction is kept."""
        self.note(layer, value, weight, scale)
        if layer in self._means:
            self._lost_of_base[layer] = self._lost[layer].clone()

    def restore(self, layer: str) -> bool:
        """Makes the correction that of the base again, bit for bit; False where that is not known."""
        known = layer in self._lost_of_base
        if known:
            self._lost[layer].copy_(self._lost_of_base[layer])
        return known

    def forget_base(self, layer: str) -> None:
        """The base has changed."""
        self._lost_of_base.pop(layer, None)

    def apply(self, layers: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Writes the biases that blocks read: bias + correction, rounded once."""
        changed = [layer for layer in layers if layer in self._means]
        if not changed:
            return
        biases = [tensors[f"{layer}.bias"] for layer in changed]
        sums = torch._foreach_add([self._lost[layer] for layer in changed], biases)
        torch._foreach_copy_([tensors[f"{layer}.{CORRECTED_BIAS}"] for layer in changed], sums)
