"""Whether static input scales hold what goes into FP8 layers: looked at in the first step after weights changed.

Compiled blocks do not say what they cut off. So each block is run once more by PyTorch, on the inputs that it gets, and
what that returns is thrown away: outputs keep their bits. It costs about one step in PyTorch, once per change of the
weights, and nothing at all where scales are dynamic.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .block_precisions import BlockPrecisions
from .compilation import Blocks
from .execution import BlockWeights, DoubleBlock, Pe, SingleBlock
from .flux.architecture import FluxArchitecture
from .flux.attention import attend
from .flux.catalogue import SegmentName, segment
from .flux.linear import Fp8Weight, noting_inputs
from .flux.open_sum import Stream, opened
from .flux.precision import INPUT_SCALE, Precision
from .fp8_recipe import E4M3_MAX, Fp8Recipe

_LOG = logging.getLogger("trt_core.fp8")
_HARMLESS = 464 / E4M3_MAX
"""E4M3 rounds up to here down to its largest number anyway: cutting off takes no more than rounding does."""
_NAMED = 3
"""As many layers are named in a sentence."""
_DOUBLE, _SINGLE = "double_blocks", "single_blocks"


class RangeCheck:
    """Watches the blocks of one binding. Holds no weights; what it measures stays on the device until a step ends."""

    def __init__(self, arch: FluxArchitecture) -> None:
        """Watches nothing."""
        self._arch = arch
        self._recipe: Fp8Recipe | None = None
        self._precisions: dict[str, Precision] = {}
        self._names: dict[int, str] = {}
        """id of an input's scale -> its layer: bound tensors stay the same objects."""
        self._left: set[str] = set()
        self._amax: dict[str, Tensor] = {}
        self._out_of_range: dict[str, float] = {}

    @classmethod
    def of(
        cls, arch: FluxArchitecture, recipe: Fp8Recipe | None, precisions: BlockPrecisions,
        tensors: Mapping[str, Tensor],
    ) -> RangeCheck:  # fmt: skip
        """For bound tensors by BFL name; without a static recipe it watches nothing."""
        check = cls(arch)
        if recipe is not None:
            check._recipe = recipe
            check._names = {id(tensors[f"{name}.{INPUT_SCALE}"]): name for name in recipe.input_amax}
            blocks = {f"{_DOUBLE}.{i}": p for i, p in enumerate(precisions.double)}
            blocks |= {f"{_SINGLE}.{i}": p for i, p in enumerate(precisions.single)}
            check._precisions = {name: precision for name, precision in blocks.items() if precision.static}
        check.restart()
        return check

    def restart(self) -> None:
        """The weights are others now: the next step is looked at again."""
        self._left = set(self._precisions)
        self._amax.clear()
        self._out_of_range = {}

    @property
    def watching(self) -> bool:
        """Whether blocks are left to look at in the next step."""
        return bool(self._left)

    def watched(self, blocks: Blocks) -> Blocks:
        """The same blocks; those not looked at since the last change are looked at as they run."""
        if not self.watching:
            return blocks
        double: list[Any] = [self._watched(f"{_DOUBLE}.{i}", block) for i, block in enumerate(blocks.double)]
        single: list[Any] = [self._watched(f"{_SINGLE}.{i}", block) for i, block in enumerate(blocks.single)]
        return replace(blocks, double=double, single=single)

    def out_of_range(self) -> dict[str, float]:
        """BFL layer -> its largest input in ranges of its static scale, those above one, the furthest first."""
        self._finish()
        return dict(self._out_of_range)

    def look(self, block: str, arguments: Sequence[Any]) -> None:
        """Runs one block in PyTorch for its layers' inputs; nothing where that was done since the last change."""
        if block not in self._left:
            self._finish()  # a step ended before its last block: somebody else runs that one
            return
        self._left.discard(block)
        run = _run_double if block.startswith(_DOUBLE) else _run_single
        try:
            with noting_inputs(self._note):
                run(self._arch, self._precisions[block], *arguments)
        except torch.OutOfMemoryError:
            self._left.clear()
            self._amax.clear()
            _LOG.warning("TRT FP8: not enough GPU memory to check the static ranges of this step")
        if block == next(reversed(self._precisions)):
            self._finish()

    def _watched(self, name: str, block: DoubleBlock | SingleBlock) -> DoubleBlock | SingleBlock | _Watched:
        return _Watched(self, name, block) if name in self._precisions else block

    def _note(self, x: Tensor, weight: Fp8Weight) -> None:
        low, high = torch.aminmax(x)  # allocates nothing of the input's size
        self._amax[self._names[id(weight.input_scale)]] = torch.maximum(low.abs(), high.abs()).float()

    def _finish(self) -> None:
        """Reads what was measured, and logs it."""
        if not self._amax or self._recipe is None:
            return
        amax = dict(zip(self._amax, torch.stack(list(self._amax.values())).tolist(), strict=True))
        self._amax.clear()
        found = {name: value / self._recipe.input_limit(name) for name, value in amax.items()}
        found = dict(sorted(found.items(), key=lambda item: -item[1]))
        beyond = {name: times for name, times in found.items() if times > _HARMLESS}
        self._out_of_range |= beyond
        if beyond:
            _LOG.warning("TRT FP8: %s (headroom now %g)", range_words(beyond), self._recipe.config.headroom)
        else:
            name, times = next(iter(found.items()))
            _LOG.info("TRT FP8: inputs reach %.0f %% of their static ranges at most (%s)", times * 100, name)


class _Watched:
    """A compiled block that is looked at before it runs."""

    def __init__(self, check: RangeCheck, name: str, block: DoubleBlock | SingleBlock) -> None:
        self.takes_mask = block.takes_mask
        self._check, self._name, self._block = check, name, block

    def __call__(self, *arguments: Any) -> Any:
        self._check.look(self._name, arguments)
        return self._block(*arguments)


def range_words(out_of_range: Mapping[str, float]) -> str:
    """One sentence with the layers that are furthest out and what to do; "" where all inputs fit."""
    if not out_of_range:
        return ""
    named = [f"{name} ({times:.3g} times its range)" for name, times in list(out_of_range.items())[:_NAMED]]
    rest = [f"{len(out_of_range) - _NAMED} more"] if len(out_of_range) > _NAMED else []
    return (
        f"static FP8 scales cut off inputs of {', '.join([*named, *rest])}: calibrate again with the LoRAs applied, "
        "give more headroom, or use dynamic activations"
    )


def _run_double(
    arch: FluxArchitecture, precision: Precision, img: Stream, txt: Stream, img_mod: Tensor, txt_mod: Tensor, pe: Pe,
    weights: BlockWeights, mask: Tensor | None = None,
) -> None:  # fmt: skip
    block = segment(SegmentName.DOUBLE_BLOCK, arch, partial(attend, mask=mask), precision).function
    streams = (*opened(img, img_mod), *opened(txt, txt_mod))
    block(*streams, img_mod, txt_mod, *pe.double, *weights.before, *weights.after)


def _run_single(
    arch: FluxArchitecture, precision: Precision, x: Stream, mod: Tensor, pe: Pe, weights: BlockWeights,
    mask: Tensor | None = None,
) -> None:  # fmt: skip
    block = segment(SegmentName.SINGLE_BLOCK, arch, partial(attend, mask=mask), precision).function
    block(*opened(x, mod), mod, pe.cos, pe.sin, *weights.before, *weights.after)
