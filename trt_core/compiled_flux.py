"""diffusers' FLUX transformer with a compiled forward, as a subclass that existing objects are given."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .config import CompileConfig
from .diffusers_adapter import flux_class
from .diffusers_binding import DiffusersBinding, Slot
from .eager_blocks import block_overrides, why_eager_blocks, why_eager_model
from .errors import UnsupportedModel
from .extras import DoubleOverride, Extras, SingleOverride
from .flux.architecture import FluxArchitecture
from .forward_hooks import refuse_foreign_forward, swap_class
from .fp8_model import compute_device, moving, overrides_on, require_fp8, show_base
from .fp8_recipe import Fp8Recipe, attached_recipe
from .host import Progress
from .mutable_module import MutableTRTModule, Report
from .peft_patches import read_patches
from .terminal import TerminalProgress
from .weights import WeightPatches

_LOG = logging.getLogger("trt_core.diffusers")
_STATE = "_trt_state"


def compile_flux(transformer: nn.Module, config: CompileConfig, progress: Progress | None) -> nn.Module:
    """Gives the transformer the compiled class; raises `UnsupportedModel` for another model."""
    if not isinstance(transformer, flux_class()):
        raise UnsupportedModel(
            f"{type(transformer).__name__} is not a FLUX.1 transformer.",
            expected="diffusers' FluxTransformer2DModel.",
            fix='For other models use backend="mttm", Torch-TensorRT\'s own mutable module.',
        )
    if getattr(transformer, _STATE, None) is not None:
        restore_flux(transformer)
    arch = _architecture(transformer)
    refuse_foreign_forward(transformer)
    # Not a registered submodule or buffer: state_dict, device and parameters stay diffusers' own.
    object.__setattr__(transformer, _STATE, CompiledState(transformer, arch, config, progress or TerminalProgress()))
    swap_class(transformer, _compiled_class(type(transformer)))
    return transformer


def _architecture(model: Any) -> FluxArchitecture:
    """Read from attributes: diffusers widens a model for a control LoRA without changing the config's items."""
    config = {name: getattr(model.config, name, value) for name, value in model.config.items()}
    return FluxArchitecture.from_diffusers_config({**config, "out_channels": model.out_channels})


def restore_flux(transformer: nn.Module) -> nn.Module:
    """Takes the compiled class away again; the weights are the base, bit for bit. Does nothing to a plain model."""
    state: CompiledState | None = getattr(transformer, _STATE, None)
    if state is not None:
        state.close()
        swap_class(transformer, type(transformer).__mro__[1])
        object.__delattr__(transformer, _STATE)
    return transformer


class CompiledState:
    """Everything of ours that belongs to one transformer: the module, the binding, and what changed since."""

    def __init__(self, model: nn.Module, arch: FluxArchitecture, config: CompileConfig, progress: Progress) -> None:
        self.module = MutableTRTModule(arch, config, progress)
        self.eager: dict[str, str] = {}
        self._binding: DiffusersBinding | None = None
        self._model_said: set[str] = set()
        self._model = model
        self._recipe: Fp8Recipe | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledState:
        """A copied transformer binds its own weights and compiles at its first call, from the cache where it can."""
        module = self.module
        return CompiledState(copy.deepcopy(self._model, memo), module.arch, module.config, module.progress)

    def prepare(self) -> bool:
        """Brings weights up to date with what diffusers and PEFT did since the last call.

        False where the whole model must run eagerly; `eager` then says why.
        """
        if reason := why_eager_model(self._model):
            self._say({"the whole model": reason})
            self.release()
            return False
        if (recipe := attached_recipe(self._model)) is not self._recipe:
            self.release()
            self._recipe = recipe
        self._bind_or_bring_home()
        binding = self._present_binding()
        eager = why_eager_blocks(self._model)
        peft = read_patches(binding.slots)
        for name, why in peft.unmergeable.items():
            if not name.startswith(("double_blocks", "single_blocks")):
                self._say({"the whole model": f"{name}: {why}"})
                self.release()
                return False
            eager.setdefault(_block_of(name), why)
        self._say(eager)
        self._refit({n: p for n, p in peft.weights.items() if _block_of(n) not in eager})
        return True

    def release(self) -> None:
        """Base weights back, parameters on the bound tensors, nothing applied: before others read or move weights."""
        if self._binding is None:
            return
        self._refit({})
        self._binding = None
        self.module.unload()  # a model that moves away must not leave its fused weights behind

    def whole_model(self) -> nn.Module:
        """The model ready to run as diffusers runs it: all of it where it computes, also what FP8 keeps elsewhere."""
        if attached_recipe(self._model) is not None:
            device = compute_device(self._model)
            nn.Module._apply(self._model, lambda tensor: tensor.to(device))
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
        return moving(self._model, _architecture(self._model), recipe, self.module.config.base_weights, move)

    def close(self) -> None:
        self.release()
        self.module.close()

    def _refit(self, patches: dict[str, WeightPatches]) -> None:
        binding = self._present_binding()
        if not self.module.weights.needs(patches):
            return
        try:
            self.module.refit(patches)
        finally:
            # Also after a failed refit: parameters must never show a merged weight.
            binding.point_at_bases(self.module.weights)
        if not patches:
            # Bases kept in host memory may go stale once parameters show the bound tensors again (fuse_lora).
            self.module.weights.forget_bases()

    def _bind_or_bring_home(self) -> None:
        if self._binding is None or not self._binding.same_blocks(self._model):
            self.release()
            self._bind()
            return
        moved = self._binding.moved()
        if not moved:
            return
        if self._recipe is not None:
            self._bind_anew(moved)
            return
        restored = {slot.name for slot in moved} & self.module.weights.touched
        reassigned = [(p, p.data) for slot in moved if (p := slot.parameter()) is not None]
        self._refit({})
        for parameter, data in reassigned:  # the refit pointed them at their bases
            parameter.data = data
        reason = self._binding.bring_home(moved)
        self._binding.point_at_bases(self.module.weights)
        _LOG.info("%d re-assigned weights brought home (%d under a LoRA)", len(moved), len(restored))
        if reason is not None:
            _LOG.info("binding the model again: %s", reason)
            self._bind()

    def _bind(self) -> None:
        arch = _architecture(self._model)
        if arch != self.module.arch:
            _LOG.info("the architecture changed (%d input channels now): compiling anew", arch.in_channels)
            config, progress = self.module.config, self.module.progress
            self.module.close()
            self.module = MutableTRTModule(arch, config, progress)
        self._binding = DiffusersBinding(self._model, arch)
        if self._recipe is None:
            self.module.load(self._binding.tensors, scale_first=True)
            return
        device = compute_device(self._model)
        require_fp8(device)
        self.module.load_fp8(
            self._binding.tensors, self._recipe, device, show_base(self._binding), scale_first=True
        )  # fmt: skip
        self._binding.point_at_bases(self.module.weights)

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

    def _say(self, eager: dict[str, str]) -> None:
        for block, reason in eager.items():
            if (line := f"{block} runs eagerly: {reason}") not in self._model_said:
                self._model_said.add(line)
                _LOG.info(line)
        self.eager = eager


def _block_of(name: str) -> str:
    """ "double_blocks.3" of "double_blocks.3.img_attn.qkv.weight"."""
    return ".".join(name.split(".")[:2])


_classes: dict[type, type] = {}


def _compiled_class(original: type) -> type:
    """The compiled subclass of a transformer class; it keeps the name, which diffusers writes into saved configs."""
    if original not in _classes:
        _classes[original] = type(original.__name__, (original,), dict(_METHODS))
    return _classes[original]


def _forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    controlnet_single_block_samples: Sequence[Tensor] | None = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
) -> Any:
    """diffusers' forward through compiled segments; same arguments and result as FluxTransformer2DModel.forward."""
    state: CompiledState = getattr(self, _STATE)
    kwargs = dict(joint_attention_kwargs or {})
    scale = kwargs.pop("scale", 1.0)
    with _lora_scale(self, scale):
        if kwargs:
            state.release()
            state._say({"the whole model": f"joint_attention_kwargs has {', '.join(sorted(kwargs))}"})
        if kwargs or not state.prepare():
            return _original(self).forward(
                state.whole_model(), hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
                kwargs or None, controlnet_block_samples, controlnet_single_block_samples, return_dict,
                controlnet_blocks_repeat,
            )  # fmt: skip
        img_ids, txt_ids = _flat(img_ids), _flat(txt_ids)
        _check_guidance(state.module.arch, guidance)
        extras = Extras(
            _spread(controlnet_block_samples, state.module.arch.double_depth, controlnet_blocks_repeat),
            _spread(controlnet_single_block_samples, state.module.arch.single_depth, False),
            *state.overrides(),
        )
        dtype = self.x_embedder.weight.dtype if hasattr(self.x_embedder, "weight") else hidden_states.dtype
        output = state.module(
            hidden_states, encoder_hidden_states, timestep.to(dtype), pooled_projections, img_ids, txt_ids,
            None if guidance is None else guidance.to(dtype), extras,
        )  # fmt: skip
    if not return_dict:
        return (output,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=output)


class _lora_scale:  # noqa: N801 - used as `with _lora_scale(...)`
    """diffusers' `joint_attention_kwargs={"scale": s}`: every adapter scaled for one call."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        self._model, self._scale = model, scale

    def __enter__(self) -> None:
        if self._scale != 1.0:
            from diffusers.utils import scale_lora_layers

            scale_lora_layers(self._model, self._scale)

    def __exit__(self, *exc: object) -> None:
        if self._scale != 1.0:
            from diffusers.utils import unscale_lora_layers

            unscale_lora_layers(self._model, self._scale)


def _released(name: str) -> Callable[..., Any]:
    """diffusers' method `name`, run while every parameter shows its base weight on the model's own device."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: CompiledState | None = getattr(self, _STATE, None)
        if state is not None:
            state.release()
        return getattr(_original(self), name)(self, *args, **kwargs)

    method.__name__ = name
    return method


def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """What is behind .to(), .cuda(), .half(), while every parameter shows its base weight."""
    state: CompiledState | None = getattr(self, _STATE, None)
    if state is None:
        return _original(self)._apply(self, fn, recurse)
    state.release()
    return _original(self)._apply(self, state.moving(fn), recurse)


def _report(self: Any) -> Report:
    """What runs where: segments and backends, build seconds, the last refit, blocks that run eagerly and why."""
    state: CompiledState = getattr(self, _STATE)
    return state.module.report(state.eager)


def _original(model: nn.Module) -> Any:
    return type(model).__mro__[1]


def _check_guidance(arch: FluxArchitecture, guidance: Tensor | None) -> None:
    if arch.guidance and guidance is None:
        raise UnsupportedModel(
            "This FLUX model is guidance-distilled, and no guidance was given.",
            fix="Pass guidance_scale to the pipeline, or `guidance` to the transformer.",
        )


def _flat(ids: Tensor) -> Tensor:
    return ids[0] if ids.ndim == 3 else ids


def _spread(samples: Sequence[Tensor] | None, depth: int, repeat: bool) -> list[Tensor]:
    """One residual per block from a ControlNet's fewer samples, as diffusers spreads them."""
    if not samples:
        return []
    interval = math.ceil(depth / len(samples))
    return [samples[i % len(samples)] if repeat else samples[i // interval] for i in range(depth)]


_METHODS = {
    "forward": _forward,
    "trt_report": _report,
    "_apply": _apply,
    **{
        name: _released(name)
        for name in (
            # fuse and unfuse write to the base; load_lora_adapter and add_adapter make adapters where the base lies,
            # which may be host memory, and may swap them in place.
            "fuse_lora", "unfuse_lora", "load_lora_adapter", "add_adapter", "unload_lora", "load_state_dict",
            "state_dict", "save_pretrained", "fuse_qkv_projections", "unfuse_qkv_projections",
        )
    },
}  # fmt: skip
