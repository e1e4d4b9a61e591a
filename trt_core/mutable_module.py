"""MutableTRTModule: a FLUX transformer in compiled segments whose weights can change in milliseconds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .backends.compiler import SegmentCompiler
from .background import Stopwatch
from .base_storage import HostSlabs
from .block_runner import BlockRunner
from .compiled_blocks import CompiledBlocks
from .config import CompileConfig, Layout, Profile
from .engine_cache import EngineCache
from .errors import ShapeOutsideProfile, TRTError, UnsupportedModel
from .execution import DoubleBlock, Pe, SingleBlock
from .extras import Extras
from .flux import stem
from .flux.architecture import FluxArchitecture
from .flux.rope import rope_cos_sin
from .flux.weights import DOUBLE_OUT, DOUBLE_QKV, SINGLE_OUT, SINGLE_QKV_MLP, check_complete, weight_shapes
from .host import Progress, Silent
from .plan import Measurement
from .plan_search import PlanSearch
from .weights import BoundWeights, RefitReport, WeightPatches

_LOG = logging.getLogger("trt_core.module")
_BLOCKS = ("double_blocks.", "single_blocks.")


class ModuleState(Enum):
    EMPTY = "empty"
    LOADED = "loaded"
    """Weights are bound; segments are compiled at the first call."""
    READY = "ready"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Report:
    """What runs where, for tables, logs and nodes. `segments`: name -> backend and why; times in seconds and ms."""

    segments: dict[str, str]
    build_seconds: float
    last_refit: RefitReport | None
    eager_blocks: dict[str, str]
    plan_bytes: int
    measurements: tuple[Measurement, ...]
    builds: int


class MutableTRTModule:
    """One FLUX transformer: `load` binds weights, the first call compiles, `refit` changes weights, `close` ends it.

    Tensors that were bound are read by address at every call: they must stay where they are until `close`.
    """

    def __init__(
        self, arch: FluxArchitecture, config: CompileConfig | None = None, progress: Progress | None = None
    ) -> None:
        self.arch = arch
        self.config = config or CompileConfig()
        self.progress: Progress = progress or Silent()
        self.state = ModuleState.EMPTY
        self.build_seconds, self.builds = 0.0, 0
        self.last_refit: RefitReport | None = None
        self._slabs = HostSlabs()
        self._cache = EngineCache(self.config.cache_folder)
        self._compiled: dict[Layout | None, CompiledBlocks] = {}
        self._weights: BoundWeights | None = None
        self._double_weights: list[list[Tensor]] = []
        self._single_weights: list[list[Tensor]] = []
        self._scale_first = False
        self._compiled_kind: tuple[torch.device, torch.dtype] | None = None
        """Device and dtype of the weights that segments were compiled for."""

    # -- weights ---------------------------------------------------------------------------------------------------

    def load(self, weights: Mapping[str, Tensor], scale_first: bool = False) -> None:
        """Binds weights by BFL name: all on one device, all of one floating dtype, contiguous.

        `scale_first`: the final layer's modulation is in diffusers' order (scale, shift). Compiled segments stay, as
        they hold no weights. Raises `UnsupportedModel` where a weight is missing, extra or of another shape.
        """
        self._refuse_closed()
        check_complete(self.arch, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        self._bind(weights)
        self._scale_first = scale_first

    def load_blocks(self, weights: Mapping[str, Tensor]) -> None:
        """Binds the blocks' weights alone, for a host that computes what surrounds them itself (`runner`).

        Otherwise as `load`; the module itself cannot be called then.
        """
        self._refuse_closed()
        around = {name: shape for name, shape in weight_shapes(self.arch).items() if not name.startswith(_BLOCKS)}
        check_complete(self.arch, around | {name: tuple(tensor.shape) for name, tensor in weights.items()})
        self._bind(weights)

    def _bind(self, weights: Mapping[str, Tensor]) -> None:
        _check_uniform(weights)
        self._weights = BoundWeights({n: t.detach() for n, t in weights.items()}, self.config.base_weights, self._slabs)
        kind = (self._weights.device, _dtype(self._weights))
        if kind != self._compiled_kind:
            self._drop_compiled()
        self._compiled_kind = kind
        tensors = self._weights.tensors
        self._double_weights = [
            [tensors[f"double_blocks.{i}.{n}"] for n in DOUBLE_QKV + DOUBLE_OUT] for i in range(self.arch.double_depth)
        ]
        self._single_weights = [
            [tensors[f"single_blocks.{i}.{n}"] for n in SINGLE_QKV_MLP + SINGLE_OUT]
            for i in range(self.arch.single_depth)
        ]
        self.state = ModuleState.READY if self._compiled else ModuleState.LOADED

    @property
    def weights(self) -> BoundWeights:
        if self._weights is None:
            raise TRTError("No weights are bound.", fix="Call load() first.")
        return self._weights

    def refit(self, patches: Mapping[str, WeightPatches]) -> RefitReport | None:
        """Makes every bound weight base + patches; None where that is already so. Touches nothing else."""
        if not self.weights.needs(patches):
            return None
        self.last_refit = self.weights.refit(patches)
        return self.last_refit

    def unload(self) -> None:
        """Restores the bound weights to their base and lets go of them; compiled segments stay for the next `load`."""
        if self._weights is not None:
            self._weights.restore()
        self._let_go()
        if self.state is not ModuleState.CLOSED:
            self.state = ModuleState.EMPTY

    def close(self) -> None:
        """Restores the bound weights to their base, closes all segments and lets go of every tensor."""
        if self.state is not ModuleState.CLOSED and self._weights is not None:
            self._weights.restore()
        self.discard()

    def discard(self) -> None:
        """As `close` for tensors that nobody else reads: they are let go of as they are, without a merge or a copy."""
        self._drop_compiled()
        self._let_go()
        self._slabs = HostSlabs()
        self.state = ModuleState.CLOSED

    def _let_go(self) -> None:
        self._weights = None
        self._double_weights, self._single_weights = [], []

    # -- the call --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self, img: Tensor, txt: Tensor, timesteps: Tensor, y: Tensor, img_ids: Tensor, txt_ids: Tensor,
        guidance: Tensor | None = None, extras: Extras | None = None,
    ) -> Tensor:  # fmt: skip
        """The transformer's output [B, n_img, out_channels].

        img [B, n_img, in_channels], txt [B, n_txt, context_dim], timesteps and guidance [B] in 0..1 and its own unit,
        y [B, vec_dim], ids [tokens, 3]. Compiles at the first call and when shapes leave the profile.
        """
        extras = extras or Extras()
        compiled = self.compiled_for(img.shape[0], img.shape[1], txt.shape[1], masked=extras.mask is not None)
        weights, dtype = self.weights.tensors, _dtype(self.weights)
        vec = stem.conditioning(weights, self.arch, timesteps, guidance, y)
        mods = stem.modulations(weights, self.arch, vec)
        pe = Pe(*rope_cos_sin(torch.cat((txt_ids, img_ids)), self.arch.axes_dim, self.arch.theta), txt.shape[1])
        img = stem.linear(weights, "img_in", img.to(dtype))
        txt = stem.linear(weights, "txt_in", txt.to(dtype))
        img, txt = self._double_blocks(compiled.double, img, txt, vec, mods, pe, extras)
        x = self._single_blocks(compiled.single, torch.cat((txt, img), dim=1), vec, mods, pe, extras)
        return stem.final_layer(weights, x[:, txt.shape[1] :], vec, self._scale_first)

    def _double_blocks(
        self, block: DoubleBlock, img: Tensor, txt: Tensor, vec: Tensor, mods: Mapping[str, Tensor], pe: Pe,
        extras: Extras,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        for index, weights in enumerate(self._double_weights):
            override = extras.double_overrides.get(index)
            if override is not None:
                img, txt = override(img, txt, vec, pe)
            else:
                name = f"double_blocks.{index}"
                img_mod, txt_mod = mods[f"{name}.img_mod"], mods[f"{name}.txt_mod"]
                img, txt = block(img, txt, img_mod, txt_mod, pe, weights, extras.mask)
            residual = _at(extras.double_residuals, index)
            if residual is not None:
                img = img + residual.to(img.dtype)
        return img, txt

    def _single_blocks(
        self, block: SingleBlock, x: Tensor, vec: Tensor, mods: Mapping[str, Tensor], pe: Pe, extras: Extras
    ) -> Tensor:
        for index, weights in enumerate(self._single_weights):
            override = extras.single_overrides.get(index)
            if override is not None:
                x = override(x, vec, pe, pe.txt_tokens)
            else:
                x = block(x, mods[f"single_blocks.{index}.modulation"], pe, weights, extras.mask)
            residual = _at(extras.single_residuals, index)
            if residual is not None:
                x[:, pe.txt_tokens :].add_(residual.to(x.dtype))
        return x

    def runner(self, batch: int, img_tokens: int, txt_tokens: int, masked: bool = False) -> BlockRunner:
        """The blocks one by one for these shapes, compiled now where they are not. Raises as the call does."""
        compiled = self.compiled_for(batch, img_tokens, txt_tokens, masked)
        blocks = (self._double_weights, self._single_weights)
        return BlockRunner(compiled.double, compiled.single, self.weights.tensors, self.arch.hidden, *blocks)

    def reconfigure(self, config: CompileConfig) -> None:
        """Other choices for the weights that are bound: what was compiled is dropped where it may differ.

        `base_weights` applies to what a later `load` binds.
        """
        if config != self.config:
            self.config, self._cache = config, EngineCache(config.cache_folder)
            self._drop_compiled()
            self.state = ModuleState.LOADED if self._weights is not None else ModuleState.EMPTY

    # -- compiling -------------------------------------------------------------------------------------------------

    def compiled_for(self, batch: int, img_tokens: int, txt_tokens: int, masked: bool = False) -> CompiledBlocks:
        """The compiled segments for these shapes, built now where there are none."""
        self._refuse_closed()
        layout = Layout.SPLIT if masked else None
        plain = self._compiled.get(None)
        if plain is not None and plain.double.takes_mask and plain.single.takes_mask:
            layout = None
        compiled = self._compiled.get(layout)
        if compiled is not None and (
            not compiled.plan.uses_profile or compiled.plan.profile.holds(batch, img_tokens, txt_tokens)
        ):
            return compiled
        profile = self._profile(compiled, batch, img_tokens, txt_tokens)
        return self._compile(profile, layout)

    def _profile(self, compiled: CompiledBlocks | None, batch: int, img_tokens: int, txt_tokens: int) -> Profile:
        wanted = compiled.plan.profile if compiled else self.config.profile
        if wanted is None:
            return Profile.around(batch, img_tokens, txt_tokens)
        if wanted.holds(batch, img_tokens, txt_tokens):
            return wanted
        if not self.config.rebuild_outside_profile:
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

    def _compile(self, profile: Profile, layout: Layout | None) -> CompiledBlocks:
        watch = Stopwatch()
        compiler = SegmentCompiler(
            self.arch, _dtype(self.weights), self.weights.device, profile, self._cache,
            self.config.error_ratio_bound, self.progress,
        )  # fmt: skip
        plan, segments = PlanSearch(compiler, self.config, layout).run()
        compiled = CompiledBlocks.of(plan, segments)
        if (before := self._compiled.pop(layout, None)) is not None:
            before.close()
        self._compiled[layout] = compiled
        self.build_seconds = watch.seconds()
        self.builds += 1
        self.state = ModuleState.READY
        self.progress.update("Ready", 1, 1)
        return compiled

    def report(self, eager_blocks: Mapping[str, str] | None = None) -> Report:
        """What runs where; `eager_blocks` are those the caller runs itself, with the reason."""
        segments: dict[str, str] = {}
        measurements: tuple[Measurement, ...] = ()
        plan_bytes = 0
        for compiled in self._compiled.values():
            measurements += compiled.plan.measurements
            segments |= compiled.words()
            plan_bytes += compiled.plan_bytes
        segments["stem, modulation, final_layer"] = "eager (0.4 % of the work)"
        return Report(
            segments,
            self.build_seconds,
            self.last_refit,
            dict(eager_blocks or {}),
            plan_bytes,
            measurements,
            self.builds,
        )

    def _drop_compiled(self) -> None:
        for compiled in self._compiled.values():
            compiled.close()
        self._compiled.clear()

    def _refuse_closed(self) -> None:
        if self.state is ModuleState.CLOSED:
            raise TRTError("This compiled model was closed.", fix="Compile the transformer again.")


def _dtype(weights: BoundWeights) -> torch.dtype:
    return next(iter(weights.tensors.values())).dtype


def _at(residuals: Sequence[Tensor | None], index: int) -> Tensor | None:
    return residuals[index] if index < len(residuals) else None


def _check_uniform(weights: Mapping[str, Tensor]) -> None:
    devices = {str(t.device) for t in weights.values()}
    dtypes = {t.dtype for t in weights.values()}
    if len(devices) > 1:
        raise UnsupportedModel(
            f"The weights lie on several devices: {', '.join(sorted(devices))}.",
            fix='Move the whole transformer to one: pipe.transformer.to("cuda").',
        )
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise UnsupportedModel(
            f"The weights have the dtypes {', '.join(sorted(str(d) for d in dtypes))}.",
            expected="One floating dtype (bfloat16, float16 or float32) for all.",
            fix="Load the transformer with torch_dtype=torch.bfloat16.",
        )
    loose = [name for name, t in weights.items() if not t.is_contiguous()]
    if loose:
        raise UnsupportedModel(f"{loose[0]} is not contiguous in memory.", fix="Call .contiguous() on it first.")
