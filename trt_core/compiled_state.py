"""What belongs to one compiled diffusers transformer: weights that follow its own, and blocks that run eagerly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import CompileConfig
from .diffusers_adapter import architecture_of
from .diffusers_binding import ChangedModulations, DiffusersBinding, Slot
from .eager_blocks import block_overrides, why_eager_blocks, why_eager_model
from .errors import UnsupportedModel
from .extras import DoubleOverride, SingleOverride
from .flux.architecture import FluxArchitecture
from .fp8_model import (
    ChangedBases,
    adapters_to_bases,
    compute_device,
    moving,
    overrides_on,
    require_fp8,
    show_base,
    to_compute_device,
)
from .fp8_recipe import Fp8Recipe, attached_recipe
from .fp8_weights import Fp8Weights
from .host import Progress
from .mutable_module import MutableTRTModule
from .peft_patches import PeftReader
from .schedule import Schedule
from .weights import WeightPatches

_LOG = logging.getLogger("trt_core.diffusers")


class CompiledState:
    """Everything of ours that belongs to one transformer: the module, the binding, and what changed since."""

    def __init__(
        self, model: nn.Module, arch: FluxArchitecture, config: CompileConfig, progress: Progress, schedule: Schedule
    ) -> None:
        self.module = MutableTRTModule(arch, config, progress)
        self.eager: dict[str, str] = {}
        self._binding: DiffusersBinding | None = None
        self._model_said: set[str] = set()
        self._model, self._schedule = model, schedule
        self._recipe: Fp8Recipe | None = None
        self._bases: ChangedBases | None = None
        self._modulations: ChangedModulations | None = None
        self._reader: tuple[DiffusersBinding, PeftReader] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledState:
        """A copied transformer binds its own weights and compiles at its first call, from the cache where it can."""
        module = self.module
        return CompiledState(copy.deepcopy(self._model, memo), module.arch, module.config, module.progress, Schedule())

    def prepare(self) -> bool:
        """Brings weights up to date with what diffusers and PEFT did since the last call.

        False where the whole model must run eagerly; `eager` then says why.
        """
        if reason := why_eager_model(self._model):
            self.say({"the whole model": reason})
            self.release()
            return False
        self._follow_recipe()
        self._bind_or_bring_home()
        binding = self._present_binding()
        eager = why_eager_blocks(self._model)
        peft = self._reader_of(binding).read()
        for name, why in peft.unmergeable.items():
            if not name.startswith(("double_blocks", "single_blocks")):
                self.say({"the whole model": f"{name}: {why}"})
                self.release()
                return False
            eager.setdefault(_block_of(name), why)
        self.say(eager)
        self._refit({n: p for n, p in peft.weights.items() if _block_of(n) not in eager})
        return True

    def _reader_of(self, binding: DiffusersBinding) -> PeftReader:
        if self._reader is None or self._reader[0] is not binding:
            self._reader = (binding, PeftReader(binding.slots))
        return self._reader[1]

    def follow_schedule(self, dtype: torch.dtype, device: torch.device) -> None:
        """Tells the module which timesteps come next, where a new schedule began.

        At each beginning kept modulations go: what changes parameters behind PyTorch's back, as `.data` does, is seen
        from the next picture on.
        """
        if self._schedule.is_new():
            self.module.expect(self._schedule.timesteps(dtype, device))

    def release(self) -> None:
        """Base weights back, parameters on the bound tensors, nothing applied: before others read or move weights."""
        if self._binding is None:
            return
        self._refit({})
        self._binding, self._bases = None, None
        self.module.unload()  # a model that moves away must not leave its fused weights behind

    def release_to_merge(self) -> None:
        """`release`, before PEFT adds adapters to their layers: FP8's bases may have gone to host memory since those
        were made on the GPU."""
        self.release()
        if self._recipe is not None:
            adapters_to_bases(self._model, architecture_of(self._model))

    def restore(self) -> None:
        """Nothing applied, before others change adapters. FP8 weights stay bound: to bind them anew is to quantize the
        whole model, and parameters show their bases at all times."""
        if self._recipe is None:
            self.release()
        elif self._binding is not None:
            self._refit({})

    def whole_model(self) -> nn.Module:
        """The model ready to run as diffusers runs it: all of it where it computes, also what FP8 keeps elsewhere."""
        if attached_recipe(self._model) is not None:
            to_compute_device(self._model)
        return self._model

    def overrides(self) -> tuple[dict[int, DoubleOverride], dict[int, SingleOverride]]:
        """diffusers' own blocks, for those that run eagerly."""
        doubles, singles = block_overrides(self._model, self.eager)
        if self._recipe is None or not (doubles or singles):
            return doubles, singles
        return overrides_on(compute_device(self._model), self._present_binding().slots, doubles, singles)

    def moving(self, move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What `.to(...)` shall do to each tensor: FP8's bases may stay in host memory."""
        recipe = attached_recipe(self._model)
        if recipe is None:
            return move
        return moving(self._model, architecture_of(self._model), recipe, self.module.config.base_weights, move)

    def close(self) -> None:
        self.release()
        self.module.close()

    def say(self, eager: dict[str, str]) -> None:
        """What runs eagerly from now on, and why; each reason is logged once."""
        for block, reason in eager.items():
            if (line := f"{block} runs eagerly: {reason}") not in self._model_said:
                self._model_said.add(line)
                _LOG.info(line)
        self.eager = eager

    def _follow_recipe(self) -> None:
        recipe = attached_recipe(self._model)
        if recipe is self._recipe:
            return
        self.release()
        if recipe is None:
            to_compute_device(self._model)
        self._recipe = recipe

    def _refit(self, patches: dict[str, WeightPatches]) -> None:
        binding = self._present_binding()
        if not self.module.weights.needs(patches):
            return
        pointed = False

        def point() -> None:
            nonlocal pointed
            binding.point_at_bases(self.module.weights)
            pointed = True

        try:
            self.module.refit(patches, meanwhile=point)
        finally:
            if not pointed:  # also after a failed refit: parameters must never show a merged weight
                point()
        if not patches:
            # Bases kept in host memory may go stale once parameters show the bound tensors again (fuse_lora).
            self.module.weights.forget_bases()

    def _bind_or_bring_home(self) -> None:
        if self._binding is None or not self._binding.same_blocks(self._model):
            self.release()
            self._bind()
            return
        moved = self._binding.moved()
        if moved or (self._modulations is not None and self._modulations.changed()):
            self.module.forget_modulations()
        if moved and self._recipe is not None:
            self._bind_anew(moved)
        elif moved:
            self._bring_home(self._binding, moved)
        elif self._bases is not None and (changed := self._bases.changed()):
            self._quantize_again(changed)

    def _quantize_again(self, names: list[str]) -> None:
        if isinstance(weights := self.module.weights, Fp8Weights):
            weights.quantize_again(names)
            self.module.forget_modulations()

    def _bring_home(self, binding: DiffusersBinding, moved: list[Slot]) -> None:
        restored = {slot.name for slot in moved} & self.module.weights.touched
        reassigned = [(p, p.data) for slot in moved if (p := slot.parameter()) is not None]
        self._refit({})
        for parameter, data in reassigned:  # the refit pointed them at their bases
            parameter.data = data
        reason = binding.bring_home(moved)
        if reason is not None:
            _LOG.info("binding the model again: %s", reason)
            self._bind()
            return
        binding.point_at_bases(self.module.weights)
        _LOG.info("%d re-assigned weights brought home (%d under a LoRA)", len(moved), len(restored))

    def _bind(self) -> None:
        arch = architecture_of(self._model)
        if arch != self.module.arch:
            _LOG.info("the architecture changed (%d input channels now): compiling anew", arch.in_channels)
            config, progress = self.module.config, self.module.progress
            self.module.close()
            self.module = MutableTRTModule(arch, config, progress)
        self._binding = None  # until the weights are there: a load that fails leaves nothing to restore
        device = compute_device(self._model)
        if self._recipe is not None:
            require_fp8(device)
        binding = DiffusersBinding(self._model, arch)
        if self._recipe is None:
            self.module.load(binding.tensors, scale_first=True)
        else:
            self.module.load_fp8(binding.tensors, self._recipe, device, show_base(binding), scale_first=True)
            binding.point_at_bases(self.module.weights)
            self._bases = ChangedBases(binding.slots, self._recipe)
        self._binding, self._modulations = binding, ChangedModulations(binding.slots)

    def _bind_anew(self, moved: list[Slot]) -> None:
        """FP8: a re-assigned parameter is a new base, from which everything is quantized again."""
        reassigned = [(p, p.data) for slot in moved if (p := slot.parameter()) is not None]
        self.release()
        for parameter, data in reassigned:  # the release pointed them at their old bases
            parameter.data = data
        _LOG.info("%d re-assigned weights: quantizing the model again", len(moved))
        self._bind()

    def _present_binding(self) -> DiffusersBinding:
        if self._binding is None:
            self._bind()
        if self._binding is None:
            raise UnsupportedModel("The transformer could not be bound.")
        return self._binding


def _block_of(name: str) -> str:
    """ "double_blocks.3" of "double_blocks.3.img_attn.qkv.weight"."""
    return ".".join(name.split(".")[:2])
