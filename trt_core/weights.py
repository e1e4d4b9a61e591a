"""Bound weights: the tensors that engines read by address, and exact refit from base weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .background import Stopwatch
from .base_storage import BaseSource, BaseStorage, HostSlabs
from .config import BaseWeights
from .errors import LoraMismatch, OutOfMemory, TRTError
from .flux.branches import Branches
from .lora.changes import Patch, merged
from .lora.files import Lora
from .low_rank_merge import Merges
from .row_merge import add_rows, disjoint

_LOG = logging.getLogger("trt_core.refit")


@dataclass(frozen=True, slots=True)
class WeightPatches:
    """All that LoRAs do to one weight, in order; equal `signature` means the same result."""

    signature: Hashable
    patches: tuple[tuple[Patch, float], ...]


@dataclass(frozen=True, slots=True)
class RefitPlan:
    """Names to merge anew, to restore to the base, and to leave as they are."""

    merge: tuple[str, ...]
    restore: tuple[str, ...]
    unchanged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What one refit did. `layers` were changed; `base_weights` says where their base is kept ("gpu", "host")."""

    layers: int
    merged: int
    restored: int
    milliseconds: float
    base_gpu_bytes: int
    base_host_bytes: int


def plan_refit(new: Mapping[str, Hashable], applied: Mapping[str, Hashable]) -> RefitPlan:
    """What a refit from `applied` to `new` signatures touches: nothing outside `keys(new) | keys(applied)`."""
    merge = tuple(name for name in new if applied.get(name) != new[name])
    restore = tuple(name for name in applied if name not in new)
    merged_anew = set(merge)
    return RefitPlan(merge, restore, tuple(name for name in new if name not in merged_anew))


Patches = Sequence[tuple[Patch, float]]
"""Patches with their strengths, in order."""


class BoundWeights:
    """Tensors by BFL name, written in place by `refit` and never moved: engines and graphs keep their addresses."""

    def __init__(
        self, tensors: Mapping[str, Tensor], mode: BaseWeights, slabs: HostSlabs | None = None,
        source: BaseSource | None = None,
    ) -> None:  # fmt: skip
        self.tensors = dict(tensors)
        self.device = next(iter(self.tensors.values())).device
        self._bases = BaseStorage(mode, self.device, slabs, source)
        self._applied: dict[str, WeightPatches] = {}
        self._merged: set[str] = set()
        """Names whose bound tensor holds something else than its base."""

    @property
    def branches(self) -> Branches | None:
        """LoRAs that are applied beside their weights: FP8 models' on modulations."""
        return None

    @property
    def bound_bytes(self) -> int:
        """What the bound tensors take on the device; kept bases and `branches` come on top."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def branch_bytes(self) -> int:
        """What `branches` take on the device."""
        return 0 if self.branches is None else self.branches.bytes

    @property
    def dtype(self) -> torch.dtype:
        """What blocks compute in."""
        return next(iter(self.tensors.values())).dtype

    @property
    def touched(self) -> frozenset[str]:
        """Names that LoRAs change now."""
        return frozenset(self._applied)

    def base(self, name: str) -> Tensor:
        """The unmerged weight: the kept copy of a touched one, else the bound tensor itself."""
        return self._kept(name) if name in self._merged else self.tensors[name]

    def readable(self, name: str) -> Tensor | None:
        """The weight as it is now in the compute dtype, for code that is not compiled; None for an unknown name."""
        return self.tensors.get(name)

    def needs(self, new: Mapping[str, WeightPatches]) -> bool:
        """Whether a refit to `new` would write anything."""
        return len(new) != len(self._applied) or any(
            name not in self._applied or self._applied[name].signature != patches.signature
            for name, patches in new.items()
        )

    @torch.no_grad()
    def refit(self, new: Mapping[str, WeightPatches], meanwhile: Callable[[], None] = lambda: None) -> RefitReport:
        """Writes base + sum of patches into the touched weights, each rounded once; others keep their bits.

        A refit depends on `new` alone, not on what was applied before. On any failure, Ctrl-C too, the weights from
        before are put back: raises `OutOfMemory` or `LoraMismatch`. `meanwhile` is called where nothing failed, while
        the GPU still merges.
        """
        watch = Stopwatch()
        plan = plan_refit({n: p.signature for n, p in new.items()}, {n: p.signature for n, p in self._applied.items()})
        self._check(new)
        writes = self._writes(plan, new)
        kept = [name for name, patches in writes.items() if patches and name not in self._merged]
        self._keep(kept)
        written: list[str] = []
        complete = False
        try:
            merges = Merges(self.device)
            for name, patches in writes.items():
                written.append(name)
                self._write(name, patches, merges)
            merges.finish()
            self._written(written)
            self._apply_beside(new, plan.merge)
            complete = True
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "Out of GPU memory while merging a LoRA; the weights from before are back.",
                fix='Use base_weights="host", or unload other models.',
                widget="base_weights",
            ) from error
        finally:
            if not complete:
                self._roll_back(written, kept)
        self._note(plan, new, writes)
        meanwhile()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._report(plan, watch)

    def free_base_gpu(self, wanted_bytes: float) -> int:
        """Lets go of copies of base weights on the device until `wanted_bytes` are free; returns the bytes freed."""
        return self._bases.free_gpu(wanted_bytes)

    def restore(self) -> None:
        """Every weight is its base again, bit for bit."""
        self.refit({})

    def forget_bases(self) -> None:
        """Drops kept host copies of untouched weights, whose bound tensors were changed by somebody else."""
        if self._applied:
            raise TRTError("Base weights are in use while a LoRA is applied.", fix="Restore the base first.")
        self._bases.forget()

    def _check(self, new: Mapping[str, WeightPatches]) -> None:
        unknown = [name for name in new if name not in self.tensors]
        if unknown:
            raise LoraMismatch(f"The LoRA changes {unknown[0]}, which this model does not have.")

    def _writes(self, plan: RefitPlan, new: Mapping[str, WeightPatches]) -> dict[str, Patches]:
        """What to merge into the bound tensors; nothing to merge means the base."""
        wanted = {name: self._to_merge(name, new[name].patches) for name in plan.merge}
        writes: dict[str, Patches] = {**dict.fromkeys(plan.restore, ()), **wanted}
        return {name: patches for name, patches in writes.items() if patches or name in self._merged}

    def _to_merge(self, name: str, patches: Patches) -> Patches:
        """Those patches that are merged into the bound tensor; the others are applied beside it."""
        return patches

    def _apply_beside(self, new: Mapping[str, WeightPatches], changed: Collection[str]) -> None:
        """Applies what is not merged, where names are `changed`; with what was applied before, it undoes a refit."""

    def _written(self, names: Collection[str]) -> None:
        """Follows bound tensors that were just written."""

    def _note(self, plan: RefitPlan, new: Mapping[str, WeightPatches], writes: Mapping[str, Patches]) -> None:
        for name, patches in writes.items():
            if patches:
                self._merged.add(name)
            else:
                self._merged.discard(name)
                self._give_back(name)
        for name in plan.restore:
            del self._applied[name]
        self._applied.update({name: new[name] for name in plan.merge})

    def _keep(self, names: Sequence[str]) -> None:
        self._bases.keep({name: self.tensors[name] for name in names})

    def _kept(self, name: str) -> Tensor:
        return self._bases[name]

    def _write(self, name: str, patches: Patches, merges: Merges) -> None:
        """Writes base + patches to the bound tensor, now or when `merges` finishes."""
        bound, lent = self.tensors[name], not self._bases.on_gpu(name)
        base = self._kept(name).to(bound.device, non_blocking=True)
        if not patches:
            bound.copy_(base)
        elif merges.add(bound, base, patches, lent):
            return
        elif disjoint(patches):
            add_rows(bound, base, patches)
        else:
            bound.copy_(merged(base, patches))

    def _roll_back(self, written: Sequence[str], kept: Sequence[str]) -> None:
        """Puts what a failed refit has written back; merged in host memory, because the GPU may have just run out."""
        for name in written:
            if name not in self._merged:
                self._put_base(name)
                continue
            before, base = self._applied[name], self._kept(name).cpu()
            self._put(name, merged(base, [(patch.to("cpu"), strength) for patch, strength in before.patches]))
            # Another device may round otherwise: the next refit merges it anew, to the bits of a fresh one.
            self._applied[name] = WeightPatches(object(), before.patches)
        self._written(written)
        self._apply_beside(self._applied, self._applied)
        for name in kept:
            self._give_back(name)

    def _give_back(self, name: str) -> None:
        self._bases.give_back(name)

    def _put_base(self, name: str) -> None:
        self._put(name, self._kept(name).cpu())

    def _put(self, name: str, value: Tensor) -> None:
        self.tensors[name].copy_(value)

    def _report(self, plan: RefitPlan, watch: Stopwatch) -> RefitReport:
        milliseconds = watch.seconds() * 1000
        layers = len(plan.merge) + len(plan.restore)
        _LOG.info(
            "refit: %d layers merged, %d restored, %d unchanged, %.1f ms, base weights %.2f GB on GPU, %.2f GB on host",
            len(plan.merge), len(plan.restore), len(plan.unchanged), milliseconds,
            self.base_gpu_bytes / 1e9, self.base_host_bytes / 1e9,
        )  # fmt: skip
        return RefitReport(
            layers,
            len(plan.merge),
            len(plan.restore),
            milliseconds,
            self.base_gpu_bytes,
            self.base_host_bytes,
        )

    @property
    def base_gpu_bytes(self) -> int:
        return self._bases.gpu_bytes

    @property
    def base_host_bytes(self) -> int:
        return self._bases.host_bytes


def file_patches(loras: Sequence[tuple[Lora, float]]) -> dict[str, WeightPatches]:
    """What several LoRA files at their strengths do, by weight, in the order given; strength 0 touches nothing."""
    collected: dict[str, tuple[list[Hashable], list[tuple[Patch, float]]]] = {}
    for lora, strength in loras:
        for patch in lora.patches if strength else ():
            marks, patches = collected.setdefault(patch.weight, ([], []))
            marks.append((lora.fingerprint, strength))
            patches.append((patch, strength))
    return {name: WeightPatches(tuple(marks), tuple(patches)) for name, (marks, patches) in collected.items()}
