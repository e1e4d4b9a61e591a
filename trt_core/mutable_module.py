"""MutableTRTModule: a FLUX transformer in compiled segments whose weights can change in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from enum import Enum

import torch
from torch import Tensor

from .base_storage import BaseSource
from .block_precisions import NORMS, BlockPrecisions
from .block_runner import BlockRunner
from .compilation import Blocks, Bound, Compilation, Samples, Shapes
from .config import CompileConfig
from .errors import OutOfMemory, TRTError
from .execution import BlockWeights
from .extras import Extras
from .flux.architecture import FluxArchitecture
from .flux.modulation_table import ModulationTable, why_no_table
from .flux.weights import check_complete, weight_shapes
from .fp8_recipe import Fp8Recipe, is_modulation
from .fp8_weights import Fp8Weights, Placed, base_place
from .given_fp8 import GivenFp8, GivenFp8Weights
from .host import Progress, Silent
from .host_slabs import HostSlabs
from .range_check import RangeCheck
from .report import Report
from .step import Step, StepInputs
from .step_graph import StepGraphs, why_not_graph
from .weight_checks import check_one_device, check_uniform
from .weights import BoundWeights, RefitReport, WeightPatches

_BLOCKS = ("double_blocks.", "single_blocks.")


class ModuleState(Enum):
    EMPTY = "empty"
    LOADED = "loaded"
    """Weights are bound; segments are compiled at the first call."""
    READY = "ready"
    CLOSED = "closed"


class MutableTRTModule:
    """One FLUX transformer: `load` binds weights, the first call compiles, `refit` changes weights, `close` ends it.

    Tensors that were bound are read by address at every call: they must stay where they are until `close`. A size that
    is called for the third time becomes a CUDA graph (`step_graph`), which a `refit` leaves valid: it writes in place.
    FP8 models begin their graphs again where the ranks of LoRAs on modulations change (`BoundWeights.branches`).
    """

    def __init__(
        self, arch: FluxArchitecture, config: CompileConfig | None = None, progress: Progress | None = None,
        base_source: BaseSource | None = None,
    ) -> None:  # fmt: skip
        self.arch = arch
        self.config = config or CompileConfig()
        self.progress: Progress = progress or Silent()
        self.state = ModuleState.EMPTY
        self.last_refit: RefitReport | None = None
        self._slabs, self._base_source = HostSlabs(), base_source
        self._compilation = Compilation(arch, self.config)
        self._weights: BoundWeights | None = None
        self._recipe: Fp8Recipe | None = None
        self._bound: Bound | None = None
        self._samples: Samples = {}
        self._ranges = RangeCheck(arch)
        self._graphs = StepGraphs()
        self._table: ModulationTable | None = None
        self._double_weights: list[BlockWeights] = []
        self._single_weights: list[BlockWeights] = []
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
        self._check(weights)
        check_one_device(weights.values())
        self._bind(BoundWeights({n: t.detach() for n, t in weights.items()}, self.config.base_weights, self._slabs))
        self._scale_first = scale_first

    def load_fp8(
        self, weights: MutableMapping[str, Tensor], recipe: Fp8Recipe, device: torch.device, placed: Placed,
        scale_first: bool = False,
    ) -> None:  # fmt: skip
        """Binds weights on `device`, the recipe's layers in FP8; otherwise as `load`.

        What is given may lie anywhere. It is taken out of `weights` one by one and becomes the base, on the GPU or in
        pinned host memory as `base_weights` says; `placed` is told where each one is, so that no other copy is kept.
        """
        self._refuse_closed()
        self._check(weights)
        given_there = all(weights[f"{name}.weight"].device == device for name in recipe.linears)
        place = base_place(self.config.base_weights, self.arch, recipe, device, given_there)
        items = ((name, weights.pop(name).detach()) for name in list(weights))
        self._bind(Fp8Weights(items, recipe, place, device, placed), recipe)
        self._scale_first = scale_first

    def load_blocks(
        self, weights: Iterable[tuple[str, Tensor]], device: torch.device, fp8: Fp8Recipe | None = None
    ) -> None:
        """Binds the blocks' weights alone, for a host that computes what surrounds them itself (`runner`).

        Otherwise as `load` and `load_fp8`; the module itself cannot be called then. `weights` may be made one by one:
        with `fp8`, only one is held in its full size where the bases are kept in host memory.
        """
        self._refuse_closed()
        if fp8 is None:
            given = dict(weights)
            self._check(given, blocks_alone=True)
            check_one_device(given.values())
            self._bind(BoundWeights(given, self.config.base_weights, self._slabs, self._base_source))
            return
        place = base_place(self.config.base_weights, self.arch, fp8, device, given_there=False)
        bound = Fp8Weights(weights, fp8, place, device, source=self._base_source)
        self._check(bound.outlines(), blocks_alone=True)
        self._bind(bound, fp8)

    def load_given_blocks(
        self, weights: Iterable[tuple[str, Tensor | GivenFp8]], device: torch.device, recipe: Fp8Recipe
    ) -> None:
        """As `load_blocks` for weights that are FP8 already: the recipe's layers are bound as they are given."""
        self._refuse_closed()
        bound = GivenFp8Weights(weights, recipe, self.config.base_weights, device, self._slabs)
        self._check(bound.outlines(), blocks_alone=True)
        self._bind(bound, recipe)

    def _check(self, weights: Mapping[str, Tensor], blocks_alone: bool = False) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if blocks_alone:
            shapes |= {name: shape for name, shape in weight_shapes(self.arch).items() if not name.startswith(_BLOCKS)}
        check_complete(self.arch, shapes)
        check_uniform(weights)

    def _bind(self, weights: BoundWeights, fp8: Fp8Recipe | None = None) -> None:
        self._graphs.drop()
        kind = (weights.device, weights.dtype)
        if kind != self._compiled_kind:
            self._compilation.close()
        self._weights, self._compiled_kind, self._recipe = weights, kind, fp8
        why_not = why_no_table(weights.tensors, self.arch, weights.dtype)
        self._table = ModulationTable(weights.tensors, self.arch, weights.dtype) if why_not is None else None
        self._describe()
        self.state = ModuleState.LOADED if self._compilation.empty else ModuleState.READY

    def _describe(self) -> None:
        """What blocks are made for these weights: again where the norms of q and k changed."""
        self._graphs.drop()
        weights, fp8 = self.weights, self._recipe
        precisions = BlockPrecisions.of(self.arch, fp8, weights.tensors)
        corrected = fp8 is not None and bool(fp8.input_mean)
        self._bound = Bound(weights.dtype, weights.device, precisions.double, precisions.single, corrected)
        self._double_weights, self._single_weights = precisions.weights(weights.tensors)
        self._samples = precisions.samples(self._double_weights, self._single_weights)
        self._ranges = RangeCheck.of(self.arch, fp8, precisions, weights.tensors)

    @property
    def builds(self) -> int:
        """How often blocks were compiled or loaded from the cache."""
        return self._compilation.builds

    @property
    def weights(self) -> BoundWeights:
        if self._weights is None:
            raise TRTError("No weights are bound.", fix="Call load() first.")
        return self._weights

    def refit(
        self, patches: Mapping[str, WeightPatches], meanwhile: Callable[[], None] = lambda: None
    ) -> RefitReport | None:
        """Makes every bound weight base + patches; None where that is already so. Touches nothing else.

        `meanwhile` is called while the GPU merges, where nothing failed (`BoundWeights.refit`).
        """
        if not self.weights.needs(patches):
            return None
        touched = {*patches, *self.weights.touched}
        try:
            self.last_refit = self._refit(patches, meanwhile)
        finally:
            if any(is_modulation(name.rpartition(".")[0]) for name in touched):
                self.forget_modulations()
        if self._recipe is not None and any(name.endswith(NORMS) for name in touched):
            self._describe()
        self._ranges.restart()
        return self.last_refit

    def expect(self, timesteps: Tensor | None) -> None:
        """The timesteps of the schedule that begins, as calls will give them, to the bit; None: nobody knows them.

        Modulations are then computed once for many steps (`ModulationTable`). A guess that is wrong costs nothing.
        """
        if self._table is not None:
            self._table.forget()
            self._table.expect(timesteps)

    def forget_modulations(self) -> None:
        """After a change of weights that was no `refit`."""
        if self._table is not None:
            self._table.forget()

    @property
    def table_bytes(self) -> int:
        """What kept modulations take on the GPU."""
        return 0 if self._table is None else self._table.bytes

    def _refit(self, patches: Mapping[str, WeightPatches], meanwhile: Callable[[], None]) -> RefitReport:
        try:
            return self.weights.refit(patches, meanwhile)
        except OutOfMemory:
            if not self._graphs.drop():
                raise
        return self.weights.refit(patches, meanwhile)  # with the memory of the graphs

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
        self._graphs.drop()
        self._compilation.close()
        self._let_go()
        self._slabs = HostSlabs()
        self.state = ModuleState.CLOSED

    def _let_go(self) -> None:
        self._graphs.drop()
        self._weights, self._bound, self._samples, self._table = None, None, {}, None
        self._ranges = RangeCheck(self.arch)
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
        inputs = StepInputs(img, txt, timesteps, y, img_ids, txt_ids, guidance)
        blocks = self.blocks_for(img.shape[0], img.shape[1], txt.shape[1], masked=extras.mask is not None)
        weights, choices = self.weights, self._compilation.choices
        step = Step(
            self.arch, blocks, weights.tensors, self._double_weights, self._single_weights, weights.dtype,
            self._scale_first, extras, weights.branches, self._table,
        )  # fmt: skip
        why_not = why_not_graph(
            inputs, extras, weights.device, choices, wanted=self.config.cuda_graph, watched=self._ranges.watching
        )
        owner = (self._bound, self.builds, weights.branches)
        return self._graphs.run(step, inputs, owner, choices, why_not)

    def runner(self, batch: int, img_tokens: int, txt_tokens: int, masked: bool = False) -> BlockRunner:
        """The blocks one by one for these shapes, compiled now where they are not. Raises as the call does."""
        blocks = self.blocks_for(batch, img_tokens, txt_tokens, masked)
        bound = (self._double_weights, self._single_weights, self.weights.branches, self._table)
        return BlockRunner(blocks.double, blocks.single, self.weights.tensors, self.arch.hidden, *bound)

    def reconfigure(self, config: CompileConfig) -> None:
        """Other choices for the weights that are bound: what was compiled is dropped where it may differ.

        `base_weights` applies to what a later `load` binds.
        """
        if config != self.config:
            self.config = config
            self._graphs.drop()
            self._compilation.reconfigure(config)
            self.state = ModuleState.LOADED if self._weights is not None else ModuleState.EMPTY

    # -- compiling -------------------------------------------------------------------------------------------------

    def blocks_for(self, batch: int, img_tokens: int, txt_tokens: int, masked: bool = False) -> Blocks:
        """How each block runs for these shapes, compiled now where it is not."""
        self._refuse_closed()
        if self._bound is None:
            raise TRTError("No weights are bound.", fix="Call load() first.")
        shapes = Shapes(batch, img_tokens, txt_tokens, masked)
        builds = self.builds
        blocks = self._compilation.blocks(self._bound, shapes, self._samples, self.progress)
        if self._table is not None and self._recipe is not None and builds != self.builds and self._table.takes(batch):
            self._table.prepare(batch)
        self.state = ModuleState.READY
        return self._ranges.watched(blocks)

    def report(self, eager_blocks: Mapping[str, str] | None = None) -> Report:
        """What runs where; `eager_blocks` are those the caller runs itself, with the reason."""
        compilation = self._compilation
        segments = compilation.words() | {"stem, modulation, final_layer": "eager (0.4 % of the work)"}
        return Report(
            segments,
            compilation.build_seconds,
            self.last_refit,
            dict(eager_blocks or {}),
            compilation.plan_bytes,
            compilation.measurements(),
            compilation.builds,
            self._ranges.out_of_range(),
            self._graphs.words,
        )

    def _refuse_closed(self) -> None:
        if self.state is ModuleState.CLOSED:
            raise TRTError("This compiled model was closed.", fix="Compile the transformer again.")
