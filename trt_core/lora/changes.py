"""The mathematics of one LoRA's change to one weight, in fp32, independent of files and engines.

The order of the operations is that of ComfyUI's stock loader: `weight += (strength * scale) * delta`, one
change after another, so that both programs get the same bits wherever ComfyUI computes in fp32. Nothing here
reads a tensor back to the CPU. A weight is `[out, in]`, a bias or a norm's scale is `[out]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum

import torch
from torch import Tensor


class Change(ABC):
    """What one LoRA does to one weight, or to some of its rows."""

    __slots__ = ()

    @property
    def rank(self) -> int | None:
        """The rank of the factors, None where there are none."""
        return None

    @abstractmethod
    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        """Changes `weight` (fp32, already holding the changes before this one) in place.

        `base` is the unmerged weight in any dtype. At strength 0 not one bit changes.
        """

    def to(self, device: torch.device | str) -> Change:
        """The same change on `device`, every tensor in its own dtype; copies only what is elsewhere."""
        return replace(self, **{field.name: _moved(getattr(self, field.name), device) for field in fields(self)})


class Additive(Change):
    """A change that adds `strength * scale * delta`, whatever the weight holds."""

    __slots__ = ()

    scale: float

    @abstractmethod
    def delta(self, device: torch.device | str) -> Tensor:
        """The unscaled fp32 sum to add, as a new tensor that the caller may overwrite."""

    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        if strength != 0:
            weight.add_(self.delta(weight.device).reshape(weight.shape).mul_(strength * self.scale))


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Additive):
    """LoRA: `down` [r, in], `up` [out, r], `scale` = alpha / r."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return self.down.shape[0]

    def delta(self, device: torch.device | str) -> Tensor:
        return torch.mm(_fp32(self.up, device), _fp32(self.down, device))


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard(Additive):
    """LoHa: `(w1_a @ w1_b) * (w2_a @ w2_b)`, with `w1_a`, `w2_a` [out, r] and `w1_b`, `w2_b` [r, in]."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return self.w1_b.shape[0]

    def delta(self, device: torch.device | str) -> Tensor:
        first = torch.mm(_fp32(self.w1_a, device), _fp32(self.w1_b, device))
        return first.mul_(torch.mm(_fp32(self.w2_a, device), _fp32(self.w2_b, device)))


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(Additive):
    """LoKr: the Kronecker product of `w1` [a, c] and `w2` [b, d] for a weight [a * b, c * d].

    Each is a full matrix (one tensor) or a product (two tensors).
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        products = [factors for factors in (self.w2, self.w1) if len(factors) == 2]
        return products[0][1].shape[0] if products else None

    def delta(self, device: torch.device | str) -> Tensor:
        return torch.kron(_product(self.w1, device), _product(self.w2, device))


@dataclass(frozen=True, slots=True, eq=False)
class Difference(Additive):
    """A whole difference `diff`, of the weight's own shape; also for a bias."""

    diff: Tensor
    scale: float = 1.0

    def delta(self, device: torch.device | str) -> Tensor:
        return self.diff.to(device).to(torch.float32, copy=True)


@dataclass(frozen=True, slots=True, eq=False)
class Replacement(Change):
    """A new `value` for the whole tensor; a strength between 0 and 1 lies between the old and the new."""

    value: Tensor

    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        if strength != 0:
            # lerp is exact at 1: the value's own bits are stored.
            weight.lerp_(_fp32(self.value, weight.device).reshape(weight.shape), strength)


class DoraRule(Enum):
    """Which norm divides the magnitude."""

    PEFT = "peft"
    """Rows of `base + scale * delta`, without the changes before this one, as PEFT's forward and merge do."""

    COMFYUI = "comfyui"
    """Magnitude [out, 1]: rows of the weight without the delta. Magnitude [1, in]: columns of the weight with
    it. Both with the changes before this one."""


@dataclass(frozen=True, slots=True, eq=False)
class Dora(Change):
    """DoRA: `magnitude / norm * (weight + scale * delta)`; strength scales its difference from the weight.

    `magnitude` is [out] or [out, 1], and for `DoraRule.COMFYUI` also [1, in].
    """

    inner: Additive
    magnitude: Tensor
    rule: DoraRule

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        if strength == 0:
            return
        target = self._decomposed(weight, base)
        if strength == 1:
            weight.copy_(target)
        else:
            weight.add_(target.sub_(weight).mul_(strength))

    def _decomposed(self, weight: Tensor, base: Tensor) -> Tensor:
        magnitude = _fp32(self.magnitude, weight.device)
        if magnitude.dim() == 1:
            magnitude = magnitude.unsqueeze(1)
        delta = self.inner.delta(weight.device).reshape(weight.shape).mul_(self.inner.scale)
        eps = torch.finfo(torch.float32).eps
        if self.rule is DoraRule.PEFT:
            # PEFT divides by the bare norm; the clamp only keeps rows of zeros from becoming NaN.
            norm = (delta + base).norm(dim=1, keepdim=True).clamp_min_(eps)
            return delta.add_(weight).mul_(magnitude / norm)
        total = delta.add_(weight)
        over_rows = magnitude.shape[0] == weight.shape[0]
        norm = weight.norm(dim=1, keepdim=True) if over_rows else total.norm(dim=0, keepdim=True)
        return total.mul_(magnitude / norm.add_(eps))


@dataclass(frozen=True, slots=True, eq=False)
class SwappedHalves(Change):
    """`inner` written for a weight whose upper and lower half of rows are exchanged.

    diffusers keeps the final modulation as (scale, shift), Black Forest Labs as (shift, scale).
    """

    inner: Change

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        half = weight.shape[0] // 2
        swapped = weight.roll(half, 0)
        self.inner.apply_(swapped, base.roll(half, 0), strength)
        weight.copy_(swapped.roll(half, 0))


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """One change to the BFL weight `weight`, or only to its output rows `rows` = (start, stop)."""

    weight: str
    rows: tuple[int, int] | None
    change: Change

    def apply_(self, weight: Tensor, base: Tensor, strength: float) -> None:
        """Changes `weight` (the whole fused weight, fp32) in place; rows outside `rows` keep their bits."""
        if self.rows is None:
            self.change.apply_(weight, base, strength)
        else:
            start, stop = self.rows
            self.change.apply_(weight[start:stop], base[start:stop], strength)

    def to(self, device: torch.device | str) -> Patch:
        return replace(self, change=self.change.to(device))


@torch.no_grad()
def merged(base: Tensor, changes: Iterable[tuple[Change | Patch, float]]) -> Tensor:
    """`base` plus every (change, strength) in turn, as a new fp32 tensor on the base's device.

    `base` is only read; the caller rounds once to the bound dtype. Factors on another device are copied at
    each call, `to` moves them once. There is no host sync where they are on the base's device.
    """
    weight = base.to(torch.float32, copy=True)
    for change, strength in changes:
        change.apply_(weight, base, strength)
    return weight


def _fp32(tensor: Tensor, device: torch.device | str) -> Tensor:
    # Moved first, in its own dtype: a conversion on the CPU runs in as many threads as there are cores, and on a busy
    # machine each one takes milliseconds; a LoRA has 456 factors.
    return tensor.to(device).to(torch.float32)


def _product(factors: tuple[Tensor, ...], device: torch.device | str) -> Tensor:
    if len(factors) == 1:
        return _fp32(factors[0], device)
    left, right = factors
    return torch.mm(_fp32(left, device), _fp32(right, device))


def _moved(value: object, device: torch.device | str) -> object:
    if isinstance(value, Tensor | Change):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value
