"""What is bound for one loaded model: compiled blocks and their weights, known to ComfyUI's memory management.

One per BaseModel, however many patchers share it: LoRA nodes before and after ours meet here. It lives as long as the
BaseModel and never refers to it. Engines outlive it in the engine cache, which knows no model.
"""

from __future__ import annotations

import math
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ...trt_core.config import BaseWeights, CompileConfig
from ...trt_core.errors import OutOfMemory
from ...trt_core.fp8_model import require_fp8
from ...trt_core.fp8_recipe import Fp8Recipe
from ...trt_core.fp8_weights import base_place
from ...trt_core.host import Progress, stop_if_cancelled
from ...trt_core.mutable_module import MutableTRTModule
from . import weights
from .lora_files import SHELF

_HOST = BaseWeights.HOST
_residents: weakref.WeakKeyDictionary[Any, Resident] = weakref.WeakKeyDictionary()


class TRTWeights(torch.nn.Module):
    """Stands for the bound weights where ComfyUI's log names a model."""


class BoundPatcher(comfy.model_patcher.ModelPatcher):
    """Tells ComfyUI how much GPU memory is bound, and gives it back when ComfyUI unloads it: all or nothing.

    Not a wrapper's own bookkeeping: memory that ComfyUI does not see as a model can never be evicted by it.
    """

    def __init__(self, patcher: Any, size_bytes: int, release: Callable[[], None]) -> None:
        super().__init__(TRTWeights(), patcher.load_device, patcher.offload_device, size=size_bytes)
        self.bind: Callable[[], None] | None = None
        self.bound = False
        self._release = release

    def clone(self, *args: Any, **kwargs: Any) -> BoundPatcher:
        return self

    def model_dtype(self) -> None:
        return None

    def loaded_size(self) -> int:
        return self.size if self.bound else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.bound else self.offload_device

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        if self.bound or self.bind is None:
            return 0
        self.bind()
        self.bound = True
        return self.size

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        return 0  # engines need every block: ComfyUI then detaches it whole

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            self._release()
        return self.model


class Resident:
    """The compiled blocks of one BaseModel."""

    def __init__(self, patcher: Any) -> None:
        flux = weights.flux_of(patcher)
        self.arch = weights.architecture(flux)
        self.names: Mapping[str, str] = weights.block_weights(flux)
        self.dtype = weights.compute_dtype(patcher)
        self.device: torch.device = patcher.load_device
        self.module: MutableTRTModule | None = None
        self.refused = ""
        """Why binding failed; tried again when there is room."""
        self.ran: set[Any] = set()
        """Kinds of block and shapes that have run since the last build (`blocks.BlockCall`)."""
        self.stem_uuids: dict[Hashable, uuid.UUID] = {}
        self.recipe: Fp8Recipe | None = None
        self._shapes = {name: tuple(weights.raw_base(patcher, key).shape) for name, key in self.names.items()}
        self.replaced_bytes = sum(weights.raw_base(patcher, key).nbytes for key in self.names.values())
        """What ComfyUI's own copy of the blocks would take on the GPU."""
        this = weakref.ref(self)
        self.companion = BoundPatcher(patcher, self.size_bytes, lambda: _release(this))

    @property
    def size_bytes(self) -> int:
        """What the bound weights take; the bases of FP8 weights come on top where they fit."""
        sizes = {name: math.prod(shape) for name, shape in self._shapes.items()}
        in_fp8 = self.recipe.linears if self.recipe else frozenset()
        return sum(
            n * (1 if name.removesuffix(".weight") in in_fp8 else self.dtype.itemsize) for name, n in sizes.items()
        )

    def use(self, recipe: Fp8Recipe | None) -> None:
        """Weights of another recipe are let go of; the next load binds this one's."""
        if recipe == self.recipe:
            return
        if recipe is not None:
            require_fp8(self.device)
        self.release()
        self.recipe = recipe
        self.companion.size = self.size_bytes

    def serves(self, patcher: Any) -> bool:
        """Whether the patcher computes where and in what the weights are bound."""
        return patcher.load_device == self.device and weights.compute_dtype(patcher) == self.dtype

    def fits(self) -> bool:
        """Whether the weights and ComfyUI's own minimum for a run fit on the device, were it empty."""
        if self.device.type == "cpu":
            return True
        total = comfy.model_management.get_total_memory(self.device)
        return self.size_bytes + comfy.model_management.minimum_inference_memory() < 0.95 * total

    def room(self) -> bool:
        """Whether the weights and ComfyUI's own minimum for a run fit into what is free now."""
        free = comfy.model_management.get_free_memory(self.device)
        return self.size_bytes + comfy.model_management.minimum_inference_memory() < free

    def configure(self, config: CompileConfig, progress: Progress) -> None:
        """Prepares for `config`: what is bound stays where it can."""
        if self.module is not None and self.module.config.base_weights is not config.base_weights:
            self.release()
        if self.module is None:
            self.module = MutableTRTModule(self.arch, config)
        if self.module.config != config:
            self.ran.clear()
        self.module.progress = progress
        self.module.reconfigure(config)

    def bind(self, patcher: Any) -> None:
        """Copies the base weights of all blocks to the device. Raises `OutOfMemory` with nothing left behind."""
        module, complete = self.module, False
        if module is None:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                module.load_blocks(self._read(patcher, module), self.device, self.recipe)
            self.companion.size = self.size_bytes + module.weights.base_gpu_bytes
            complete = True
        except torch.OutOfMemoryError as error:
            raise OutOfMemory("The blocks' weights do not fit on the GPU beside what others hold.") from error
        finally:
            if not complete:
                self.release()

    def _read(self, patcher: Any, module: MutableTRTModule) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, one by one, where its base is going to be: in FP8 none stays in full size on the GPU."""
        device, recipe, progress = self.device, self.recipe, module.progress
        if recipe is not None and base_place(module.config.base_weights, self.arch, recipe, device, False) is _HOST:
            device = torch.device("cpu")
        for done, (name, key) in enumerate(self.names.items()):
            if done % 20 == 0:
                stop_if_cancelled(progress, "Loading weights")
                progress.update("Loading weights", done, len(self.names))
            yield name, weights.read_base(patcher, key, device, self.dtype)
        progress.update("Loading weights", len(self.names), len(self.names))

    def release(self) -> None:
        """Gives everything back: weights, kept bases, engines. The next run binds anew."""
        module, self.module = self.module, None
        self.companion.bound, self.refused = False, ""
        self.companion.size = self.size_bytes
        self.ran.clear()
        if module is not None:
            module.discard()
            del module
            comfy.model_management.soft_empty_cache()
            empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # since torch 2.10
            if self.device.type == "cuda" and empty_host_cache is not None:
                empty_host_cache()  # the pinned memory of kept base weights: PyTorch gives none back by itself


def resident_of(patcher: Any) -> Resident:
    """The model's resident, made at its first run."""
    found = _residents.get(patcher.model)
    if found is not None and not found.serves(patcher):
        found.release()
        found = None
    if found is None:
        found = _residents[patcher.model] = Resident(patcher)
        finalizer = weakref.finalize(patcher.model, found.release)
        finalizer.atexit = False
    return found


def _release(this: weakref.ref[Resident]) -> None:
    """ComfyUI unloads: LoRA files go as well."""
    resident = this()
    if resident is not None:
        resident.release()
    SHELF.clear()
