"""Compiled blocks for the shapes, masks and precisions that calls need: built at the first call that needs them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch

from . import low_rank_merge
from .backends.compiler import SegmentCompiler
from .background import Stopwatch
from .compiled_blocks import CompiledBlocks
from .config import CompileConfig, Layout, Profile
from .engine_cache import EngineCache
from .errors import ShapeOutsideProfile
from .execution import BlockWeights, DoubleBlock, SingleBlock
from .flux.architecture import FluxArchitecture
from .flux.catalogue import BlockKind
from .flux.precision import PLAIN, Precision
from .host import Progress
from .plan import BlockChoice, Measurement
from .plan_search import PlanSearch

_LOG = logging.getLogger("trt_core.module")


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a call brings: batch, tokens, and whether there is an attention mask."""

    batch: int
    img_tokens: int
    txt_tokens: int
    masked: bool = False


@dataclass(frozen=True, eq=False)
class Bound:
    """What is bound: dtype and device that blocks compute in, and the precision of each block. Made once per binding:
    every step asks for its blocks with it, and comparing 57 precisions would cost each of them."""

    dtype: torch.dtype
    device: torch.device
    double: tuple[Precision, ...]
    single: tuple[Precision, ...]
    corrected: bool = False
    """Whether biases of FP8 layers are corrected at each merge."""

    @cached_property
    def pairs(self) -> list[tuple[Precision, Precision]]:
        """Every precision of either kind, in pairs that are compiled together: one pair unless layers are excluded."""
        double, single = list(dict.fromkeys(self.double)) or [PLAIN], list(dict.fromkeys(self.single)) or [PLAIN]
        return [(d or double[0], s or single[0]) for d, s in zip_longest(double, single)]


Samples = Mapping[tuple[BlockKind, Precision], BlockWeights]
"""Bound weights of one block of each kind and precision, to measure with: random ones would take more memory."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How each block of the model runs, by its index; `compiled` are those of the first pair."""

    double: Sequence[DoubleBlock]
    single: Sequence[SingleBlock]
    compiled: CompiledBlocks


class Compilation:
    """Everything compiled for one architecture and one set of choices. It holds no weights."""

    def __init__(self, arch: FluxArchitecture, config: CompileConfig) -> None:
        self._arch, self._config, self._cache = arch, config, EngineCache(config.cache_folder)
        self._compiled: dict[tuple[Layout | None, Precision, Precision], CompiledBlocks] = {}
        self._blocks: dict[Layout | None, Blocks] = {}
        self._bound: Bound | None = None
        """What `_blocks` are for."""
        self.build_seconds, self.builds = 0.0, 0

    def reconfigure(self, config: CompileConfig) -> None:
        """Other choices from now on; what was compiled goes."""
        self.close()
        self._config, self._cache = config, EngineCache(config.cache_folder)

    @property
    def empty(self) -> bool:
        return not self._compiled

    @property
    def choices(self) -> list[BlockChoice]:
        """How blocks run, of every kind and variant that is compiled."""
        return [choice for c in self._compiled.values() for choice in (c.plan.double, c.plan.single)]

    def blocks(self, bound: Bound, shapes: Shapes, samples: Samples, progress: Progress) -> Blocks:
        """The blocks for these shapes, compiled now where they are not."""
        layout = self._layout(bound, shapes)
        fitting = [self._fitting((layout, *pair), bound, shapes, samples, progress) for pair in bound.pairs]
        if bound is not self._bound:
            self._blocks.clear()
            self._bound = bound
        if layout not in self._blocks:
            double = {pair[0]: compiled.double for pair, compiled in zip(bound.pairs, fitting, strict=True)}
            single = {pair[1]: compiled.single for pair, compiled in zip(bound.pairs, fitting, strict=True)}
            self._blocks[layout] = Blocks(
                [double[p] for p in bound.double], [single[p] for p in bound.single], fitting[0]
            )  # fmt: skip
        return self._blocks[layout]

    def words(self) -> dict[str, str]:
        """Segment name -> backend and how its kind of block is cut; several variants of one (masks, excluded layers)
        one after the other."""
        found: dict[str, list[str]] = {}
        for (_, *precisions), compiled in self._compiled.items():
            for name, words in compiled.words(dict(zip(BlockKind, precisions, strict=True))).items():
                variants = found.setdefault(name, [])
                variants += [words] if words not in variants else []
        return {name: "; ".join(variants) for name, variants in found.items()}

    def measurements(self) -> tuple[Measurement, ...]:
        return tuple(m for compiled in self._compiled.values() for m in compiled.plan.measurements)

    @property
    def plan_bytes(self) -> int:
        return sum(compiled.plan_bytes for compiled in self._compiled.values())

    def close(self) -> None:
        for compiled in self._compiled.values():
            compiled.close()
        self._compiled.clear()
        self._blocks.clear()

    def _layout(self, bound: Bound, shapes: Shapes) -> Layout | None:
        """`SPLIT` where a mask needs it and what is compiled without one takes none."""
        if not shapes.masked:
            return None
        plain = [self._compiled.get((None, *pair)) for pair in bound.pairs]
        if all(c is not None and c.double.takes_mask and c.single.takes_mask for c in plain):
            return None
        return Layout.SPLIT

    def _fitting(
        self, key: tuple[Layout | None, Precision, Precision], bound: Bound, shapes: Shapes, samples: Samples,
        progress: Progress,
    ) -> CompiledBlocks:  # fmt: skip
        compiled = self._compiled.get(key)
        sizes = (shapes.batch, shapes.img_tokens, shapes.txt_tokens)
        if compiled is not None and (not compiled.plan.uses_profile or compiled.plan.profile.holds(*sizes)):
            return compiled
        profile = self._profile(compiled, *sizes)
        return self._compile(key, bound, profile, samples, progress)

    def _profile(self, compiled: CompiledBlocks | None, batch: int, img_tokens: int, txt_tokens: int) -> Profile:
        wanted = compiled.plan.profile if compiled else self._config.profile
        if wanted is None:
            return Profile.around(batch, img_tokens, txt_tokens)
        if wanted.holds(batch, img_tokens, txt_tokens):
            return wanted
        if not self._config.rebuild_outside_profile:
            raise ShapeOutsideProfile(
                f"{img_tokens} image tokens, {txt_tokens} text tokens, batch {batch} are outside the profile.",
                expected=(
                    f"It takes {wanted.img_tokens.min} to {wanted.img_tokens.max} image tokens (1024 px square: 4096), "
                    f"{wanted.txt_tokens.min} to {wanted.txt_tokens.max} text tokens, "
                    f"batch {wanted.batch.min} to {wanted.batch.max}."
                ),
                fix="Use a size inside it, or widen the profile (a rebuild takes seconds).",
                widget="profile",
            )
        _LOG.info("shape outside the profile: building again for up to %d image tokens", img_tokens)
        return wanted.widened(batch, img_tokens, txt_tokens)

    def _compile(
        self, key: tuple[Layout | None, Precision, Precision], bound: Bound, profile: Profile, samples: Samples,
        progress: Progress,
    ) -> CompiledBlocks:  # fmt: skip
        watch = Stopwatch()
        layout, *precisions = key
        compiler = SegmentCompiler(
            self._arch, bound.dtype, bound.device, profile, self._cache, self._config.error_ratio_bound, progress,
            dict(zip(BlockKind, precisions, strict=True)),
            {kind: samples[kind, p] for kind, p in zip(BlockKind, precisions, strict=True) if (kind, p) in samples},
        )  # fmt: skip
        # Before there is anything that a cancel would have to close.
        with_fp8 = any(p.fp8 for p in precisions)
        low_rank_merge.prepare(bound.device, bound.dtype, with_fp8, progress, bound.corrected)
        plan, segments = PlanSearch(compiler, self._config, layout).run()
        compiled = CompiledBlocks.of(plan, segments)
        if (before := self._compiled.pop(key, None)) is not None:
            before.close()
        self._compiled[key] = compiled
        self._blocks.clear()
        self.build_seconds = watch.seconds()
        self.builds += 1
        progress.update("Ready", 1, 1)
        return compiled
