"""Puts the compiled blocks into a ModelPatcher: wrappers and callbacks under our own key, the module left in place.

`PREPARE_SAMPLING` binds the weights while ComfyUI loads, `ON_PRE_RUN` reads the patches of the patcher that samples (so
LoRA nodes before and after ours count) and refits, `DIFFUSION_MODEL` swaps the innermost function and leaves all other
wrappers in their order (caches before or after ours keep working), `ON_CLEANUP` says what ran how.
"""

from __future__ import annotations

import functools
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP

from ...trt_core.config import CompileConfig
from ...trt_core.errors import OutOfMemory
from . import weights
from .blocks import BlockCall
from .eager import foreign_blocks, why_eager_blocks, why_eager_call, why_eager_model
from .host import NodeProgress, named, show
from .loading import around_blocks
from .lora_patches import effective_patches
from .quantize import recipe_of
from .resident import Resident, resident_of
from .text import RunText

KEY = "trt_core"
_TRANSFORMER_OPTIONS = 7
"""Its place among the eight positional arguments of FLUX's forward."""


def compiled(patcher: Any, config: CompileConfig, node: str, node_id: str) -> Any:
    """A clone of the patcher whose FLUX blocks run compiled. Of two such nodes in a row the last one counts."""
    weights.require_flux(patcher)
    clone, adapter = patcher.clone(), CompiledBlocks(config, node, node_id)
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, adapter.prepare),
        (WrappersMP.DIFFUSION_MODEL, adapter.diffusion_model),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    for event, callback in ((CallbacksMP.ON_PRE_RUN, adapter.pre_run), (CallbacksMP.ON_CLEANUP, adapter.cleanup)):
        clone.remove_callbacks_with_key(event, KEY)
        clone.add_callback_with_key(event, KEY, callback)
    return clone


class CompiledBlocks:
    """One node's choices, and the run that is going on. Holds no model between runs."""

    def __init__(self, config: CompileConfig, node: str, node_id: str) -> None:
        self._config, self._node, self._node_id = config, node, node_id
        self._resident: Resident | None = None
        self._foreign: frozenset[str] = frozenset()
        self._eager: dict[str, str] = {}
        self._flux: Any = None
        self._text = RunText()

    def prepare(self, executor: Any, patcher: Any, *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING: binds the weights while ComfyUI loads what it needs itself."""
        self._end()
        with named(self._node):
            resident = resident_of(patcher)
            resident.use(recipe_of(patcher))
            reason = why_eager_model(patcher, resident)
            if not reason:
                try:
                    return self._load(executor, resident, patcher, *args, **kwargs)
                except OutOfMemory as error:
                    reason = resident.refused = error.what
                    comfy.model_management.soft_empty_cache()
            else:
                resident.release()
        self._text.eager_model = reason
        return executor(patcher, *args, **kwargs)

    def _load(self, executor: Any, resident: Resident, patcher: Any, *args: Any, **kwargs: Any) -> Any:
        resident.configure(self._config, NodeProgress(self._node_id))
        self._foreign = foreign_blocks(patcher)
        self._text.fp8 = resident.fp8_words()
        with around_blocks(patcher, resident, self._foreign):
            prepared = executor(patcher, *args, **kwargs)
        self._resident = resident
        return prepared

    def pre_run(self, patcher: Any) -> None:
        """ON_PRE_RUN: makes the bound weights those of the patcher that samples."""
        resident = self._resident
        if resident is None or resident.module is None:
            return
        self._flux = weights.flux_of(patcher)
        self._eager = why_eager_blocks(self._flux, self._foreign)
        names = {name: key for name, key in resident.names.items() if weights.block_of(name) not in self._foreign}
        with named(self._node), torch.inference_mode(False), torch.no_grad():
            self._text.refit = resident.module.refit(effective_patches(patcher, names))
        self._text.refitted(patcher, self._node_id)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """DIFFUSION_MODEL: swaps the innermost function, so that wrappers before and after ours stay in order."""
        if self._resident is None or executor.class_obj is not self._flux or len(args) <= _TRANSFORMER_OPTIONS:
            return executor(*args, **kwargs)
        innermost = functools.partial(self._forward, executor.original)
        inner = WrapperExecutor.new_class_executor(
            innermost, executor.class_obj, executor.wrappers, executor.idx + 1
        )  # fmt: skip
        return inner.execute(*args, **kwargs)

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """FLUX's own `_forward`, its blocks replaced."""
        resident, options = self._resident, args[_TRANSFORMER_OPTIONS]
        if resident is None or resident.module is None:
            return original(*args, **kwargs)
        eager = dict(self._eager)
        if reason := why_eager_call(options, kwargs):
            eager |= dict.fromkeys(weights.block_names(self._flux), reason)
        call = BlockCall(resident.module, self._flux, eager, self._foreign, resident.ran)
        replace = options.get("patches_replace", {})
        dit = call.replacements(replace.get("dit", {}))
        options = {**options, "patches_replace": {**replace, "dit": dit}}
        with named(self._node):
            out = original(*args[:_TRANSFORMER_OPTIONS], options, *args[_TRANSFORMER_OPTIONS + 1 :], **kwargs)
        self._text.called(call.eager)
        return out

    def cleanup(self, patcher: Any) -> None:
        """ON_CLEANUP, also after a cancel or an error: says what ran how."""
        resident = self._resident
        if resident is not None and resident.module is not None:
            report = resident.module.report(self._text.eager)
            show(self._node_id, self._text.summary(report, weights.block_names(self._flux), self._foreign))
        elif self._text.eager_model:
            precision = "" if recipe_of(patcher) is None else ", not in FP8"
            show(self._node_id, f"Not compiled, ComfyUI runs it{precision}: {self._text.eager_model}.")
        self._end()

    def _end(self) -> None:
        self._resident, self._flux, self._eager, self._foreign = None, None, {}, frozenset()
        self._text = RunText()
