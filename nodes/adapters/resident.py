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

from ...trt_core import host_slabs
from ...trt_core.config import BaseWeights, CompileConfig
from ...trt_core.errors import OutOfMemory
from ...trt_core.fp8_recipe import Fp8Recipe, same_recipe
from ...trt_core.fp8_weights import base_place
from ...trt_core.host import Progress, stop_if_cancelled
from ...trt_core.mutable_module import MutableTRTModule
from . import weights
from .lora_files import SHELF
from .own_copy import OwnCopy
from .quantize_given import read_given, recipe_as_given, require_fp8_products

_residents: weakref.WeakKeyDictionary[Any, Resident] = weakref.WeakKeyDictionary()


class TRTWeights(torch.nn.Module):
    """Stands for the bound weights where ComfyUI's log names a model."""


class BoundPatcher(comfy.model_patcher.ModelPatcher):
    """Tells ComfyUI how much GPU memory we hold, and gives it back: copies of base weights first, then all of it.

    Not a wrapper's own bookkeeping: memory that ComfyUI does not see as a model can never be evicted by it.
    """

    def __init__(self, patcher: Any, bound_bytes: int, resident: weakref.ref[Resident]) -> None:
        super().__init__(TRTWeights(), patcher.load_device, patcher.offload_device, size=bound_bytes)
        self.bind: Callable[[], None] | None = None
        self.bound = False
        self._resident = resident
        self._base_limit = math.inf

    def clone(self, *args: Any, **kwargs: Any) -> BoundPatcher:
        return self

    def model_dtype(self) -> None:
        return None

    def model_size(self) -> int:
        resident = self._resident()
        return self.size + self._base_bytes() + (resident.beside_bytes if resident is not None else 0)

    def loaded_size(self) -> int:
        return self.model_size() if self.bound else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.bound else self.offload_device

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """`extra_memory` is what ComfyUI can spare beside what the run needs; less than none: copies have to go."""
        before = self.loaded_size()
        if self.bound and extra_memory < 0:
            extra_memory += self.partially_unload(self.offload_device, -extra_memory)
        elif not self.bound and self.bind is not None:
            self.bind()
            self.bound = True
            extra_memory -= self.loaded_size()
        self._base_limit = self._base_bytes() + max(0, extra_memory)
        return self.loaded_size() - before

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        """Copies of base weights can be read again; engines need every block: ComfyUI then detaches it whole."""
        resident = self._resident()
        return resident.free_bases(memory_to_free) if resident is not None else 0

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            _release(self._resident)
        return self.model

    def spare_bytes(self) -> float:
        """What copies of base weights may take beside those there are, for the run that was loaded last."""
        return self._base_limit - self._base_bytes()

    def _base_bytes(self) -> int:
        resident = self._resident()
        return resident.base_bytes if resident is not None else 0


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
        self.given = recipe_as_given(patcher)
        """FP8 layers of the checkpoint itself."""
        self.recipe = self.given
        self._shapes = {name: tuple(weights.raw_base(patcher, key).shape) for name, key in self.names.items()}
        self.replaced_bytes = sum(weights.raw_base(patcher, key).nbytes for key in self.names.values())
        """What ComfyUI's own copy of the blocks would take on the GPU."""
        self.companion = BoundPatcher(patcher, self._expected_bytes(self._in_eight_bits()), weakref.ref(self))
        self.own_copy = OwnCopy(self.names, self.device, self.dtype, self.companion.spare_bytes)

    @property
    def size_bytes(self) -> int:
        """What the bound weights take, or will; the bases of FP8 weights come on top where they fit."""
        if self.companion.bound and self.module is not None:
            return self.module.weights.bound_bytes
        return self._expected_bytes(self._in_eight_bits())

    def _expected_bytes(self, in_eight_bits: frozenset[str]) -> int:
        sizes = {name: math.prod(shape) for name, shape in self._shapes.items()}
        return sum(
            n * (1 if name.removesuffix(".weight") in in_eight_bits else self.dtype.itemsize)
            for name, n in sizes.items()
        )

    def _in_eight_bits(self) -> frozenset[str]:
        """Layers that will take a byte an element: modulations do not where their bases will be on the GPU."""
        if self.recipe is None or self.recipe is self.given or self.module is None:
            return frozenset() if self.recipe is None else self.recipe.linears
        place = base_place(self.module.config.base_weights, self.arch, self.recipe, self.device, False)
        return self.recipe.activation_linears if place.exact_modulations else self.recipe.linears

    def use(self, recipe: Fp8Recipe | None) -> None:
        """Weights of another recipe are let go of; the next load binds this one's. None: the weights as they are."""
        recipe = recipe or self.given
        if same_recipe(recipe, self.recipe):
            return
        if recipe is not None:
            require_fp8_products(self.device)
        self.release()
        self.recipe = recipe
        self.companion.size = self.size_bytes

    def fp8_words(self) -> str:
        """ "504 layers in FP8", "" without any."""
        if self.recipe is None:
            return ""
        return f"{len(self.recipe.linears)} layers in FP8" + (" as in the file" if self.recipe is self.given else "")

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
            self.module = MutableTRTModule(self.arch, config, base_source=self.own_copy)
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
                if self.recipe is not None and self.recipe is self.given:
                    module.load_given_blocks(self._read(patcher, module), self.device, self.recipe)
                else:
                    module.load_blocks(self._read(patcher, module), self.device, self.recipe)
            self.companion.size = module.weights.bound_bytes
            complete = True
        except torch.OutOfMemoryError as error:
            raise OutOfMemory("The blocks' weights do not fit on the GPU beside what others hold.") from error
        finally:
            if not complete:
                self.release()

    def _read(self, patcher: Any, module: MutableTRTModule) -> Iterator[tuple[str, Any]]:
        """Every weight, one by one: as FP8 where the checkpoint has it in FP8, else in the compute dtype."""
        device, progress = self._base_device(module), module.progress
        given = self.given.linears if self.given is not None and self.recipe is self.given else frozenset()
        for done, (name, key) in enumerate(self.names.items()):
            if done % 20 == 0:
                stop_if_cancelled(progress, "Loading weights")
                progress.update("Loading weights", done, len(self.names))
            if name.removesuffix(".weight") in given:
                yield name, read_given(patcher, name, self.given, self.device)
            else:
                yield name, weights.read_base(patcher, key, device, self.dtype)
        progress.update("Loading weights", len(self.names), len(self.names))

    def _base_device(self, module: MutableTRTModule) -> torch.device:
        """Where bases are going to be: of a model that is quantized, none goes to the GPU in full size for nothing."""
        if self.recipe is None or self.recipe is self.given:
            return self.device
        place = base_place(module.config.base_weights, self.arch, self.recipe, self.device, False)
        return torch.device("cpu") if place.where is BaseWeights.HOST else self.device

    @property
    def base_bytes(self) -> int:
        """What copies of base weights take on the device."""
        return self.module.weights.base_gpu_bytes if self.companion.bound and self.module is not None else 0

    @property
    def beside_bytes(self) -> int:
        """What lies beside bound weights: LoRAs on FP8 modulations, and modulations that are kept for later steps."""
        if not self.companion.bound or self.module is None:
            return 0
        return self.module.weights.branch_bytes + self.module.table_bytes

    def free_bases(self, wanted_bytes: float) -> int:
        """Lets go of copies of base weights on the device; they are read from ComfyUI's own copy when needed."""
        if not self.base_bytes or self.module is None:
            return 0
        freed = self.module.weights.free_base_gpu(wanted_bytes)
        comfy.model_management.soft_empty_cache()
        return freed

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
            host_slabs.empty_cache()


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
