"""diffusers' FLUX transformer with a compiled forward, as a subclass that existing objects are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .compiled_state import CompiledState
from .config import CompileConfig
from .diffusers_adapter import architecture_of, flux_class
from .errors import UnsupportedModel
from .extras import Extras
from .flux.architecture import FluxArchitecture
from .forward_hooks import refuse_foreign_forward, swap_class
from .fp8_model import gather
from .fp8_recipe import attached_recipe
from .host import Progress
from .report import Report
from .schedule import Schedule
from .terminal import TerminalProgress

_STATE = "_trt_state"


def compile_flux(
    transformer: nn.Module, config: CompileConfig, progress: Progress | None, schedule: Schedule
) -> nn.Module:
    """Gives the transformer the compiled class; raises `UnsupportedModel` for another model."""
    if not isinstance(transformer, flux_class()):
        raise UnsupportedModel(
            f"{type(transformer).__name__} is not a FLUX.1 transformer.",
            expected="diffusers' FluxTransformer2DModel.",
            fix='For other models use backend="mttm", Torch-TensorRT\'s own mutable module.',
        )
    _uncompile(transformer)
    arch = architecture_of(transformer)
    refuse_foreign_forward(transformer)
    # Not a registered submodule or buffer: state_dict, device and parameters stay diffusers' own.
    state = CompiledState(transformer, arch, config, progress or TerminalProgress(), schedule)
    object.__setattr__(transformer, _STATE, state)
    swap_class(transformer, _compiled_class(type(transformer)))
    return transformer


def restore_flux(transformer: nn.Module) -> nn.Module:
    """Takes the compiled class away again; the weights are the base, bit for bit, all on the model's device where they
    fit. Does nothing to a plain model."""
    if _uncompile(transformer) and attached_recipe(transformer) is not None:
        gather(transformer)
    return transformer


def _uncompile(transformer: nn.Module) -> bool:
    """Whether it was compiled; bases of FP8 layers are left in host memory, where the next compilation wants them."""
    state: CompiledState | None = getattr(transformer, _STATE, None)
    if state is None:
        return False
    state.close()
    swap_class(transformer, type(transformer).__mro__[1])
    object.__delattr__(transformer, _STATE)
    return True


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
            state.say({"the whole model": f"joint_attention_kwargs has {', '.join(sorted(kwargs))}"})
        if kwargs or not state.prepare():
            return _original(self).forward(
                state.whole_model(), hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids,
                txt_ids, guidance, kwargs or None, controlnet_block_samples, controlnet_single_block_samples,
                return_dict, controlnet_blocks_repeat,
            )  # fmt: skip
        img_ids, txt_ids = _flat(img_ids), _flat(txt_ids)
        _check_guidance(state.module.arch, guidance)
        extras = Extras(
            _spread(controlnet_block_samples, state.module.arch.double_depth, controlnet_blocks_repeat),
            _spread(controlnet_single_block_samples, state.module.arch.single_depth, False),
            *state.overrides(),
        )
        dtype = self.x_embedder.weight.dtype if hasattr(self.x_embedder, "weight") else hidden_states.dtype
        state.follow_schedule(dtype, hidden_states.device)
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


def _after(prepare: Callable[[CompiledState], None], name: str) -> Callable[..., Any]:
    """diffusers' method `name`, run while every parameter shows its base weight and nothing is applied."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: CompiledState | None = getattr(self, _STATE, None)
        if state is not None:
            prepare(state)
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
    # These write to the base, or replace it.
    **{
        name: _after(CompiledState.release, name)
        for name in ("load_state_dict", "fuse_qkv_projections", "unfuse_qkv_projections")
    },
    **{name: _after(CompiledState.release_to_merge, name) for name in ("fuse_lora", "unfuse_lora")},
    # These make adapters where the base lies, which may be host memory, and may swap them in place; or read the base.
    **{
        name: _after(CompiledState.restore, name)
        for name in ("load_lora_adapter", "add_adapter", "unload_lora", "state_dict", "save_pretrained")
    },
}
