"""What goes into linear layers while a model runs: the largest input of each, and its mean input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class InputRanges:
    """By BFL name of a linear: its largest absolute input, exact in fp32, and its mean input over all tokens and calls,
    fp32 [K] on the CPU."""

    amax: Mapping[str, float]
    mean: Mapping[str, Tensor]


class RunningRanges:
    """Maxima and sums where the inputs lie, so that nothing waits for the device: the model keeps its own speed."""

    def __init__(self) -> None:
        self._amax: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def add_amax(self, name: str, value: Tensor) -> None:
        """Counts an input [..., K] of any float dtype, not empty, for the largest one."""
        # aminmax allocates nothing of the input's size, and NaN survives it and maximum.
        low, high = torch.aminmax(value.detach())
        amax = torch.maximum(low.abs(), high.abs()).float()
        before = self._amax.get(name)
        self._amax[name] = amax if before is None else torch.maximum(before.to(amax.device), amax)

    def add_mean(self, name: str, value: Tensor) -> None:
        """Counts every row of an input [..., K] for the mean one; sums are fp32 [K]."""
        rows = value.detach().reshape(-1, value.shape[-1])
        total = rows.sum(0, dtype=torch.float32)
        before = self._sums.get(name)
        # Out of place: a caller may have switched inference mode on for some calls only.
        self._sums[name] = total if before is None else before.to(total.device) + total
        self._rows[name] = self._rows.get(name, 0) + rows.shape[0]

    def without_input(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that miss a range or a mean."""
        return [name for name in names if name not in self._amax or name not in self._sums]

    def ranges(self) -> InputRanges:
        """What was seen so far; waits for the device."""
        return InputRanges(
            {name: float(amax) for name, amax in self._amax.items()},
            {name: (total / self._rows[name]).cpu() for name, total in self._sums.items()},
        )
