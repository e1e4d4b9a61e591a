"""diffusers in and out: `compile_transformer(pipe)` makes the pipeline's transformer run in compiled segments.

The transformer object stays the same; only its class changes to a subclass with another `forward`. Everything else of
it (config, device, state_dict, save_pretrained, hooks, PEFT) is diffusers' own and keeps working.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .config import Attention, Backend, BaseWeights, CompileConfig, Profile, choice
from .errors import InvalidOption, UnsupportedModel
from .flux.architecture import FluxArchitecture
from .host import Progress


def compile_transformer(
    pipe_or_transformer: Any,
    *,
    backend: str | Backend = "auto",
    attention: str | Attention = "auto",
    base_weights: str | BaseWeights = "auto",
    profile: Profile | None = None,
    rebuild_outside_profile: bool = True,
    cache_folder: str | None = None,
    progress: Progress | None = None,
    cuda_graph: bool = True,
) -> nn.Module:
    """The transformer, which compiles itself at its first call. A pipeline is changed in place.

    backend: "auto" measures and takes the fastest; "tensorrt", "inductor" and "eager" force one; "mttm" wraps any
        module in Torch-TensorRT's own mutable module (for models other than FLUX.1).
    attention: kernel between segments: "auto", "cudnn", "flash", "efficient" or "math".
    base_weights: where unchanged weights of LoRA-touched layers are kept: "auto", "gpu" or "host".
    profile: sizes that engines accept; None takes 256 to 2048 px and tunes for the first call.
    progress: None shows a bar in the terminal. Ctrl-C cancels; what was built by then is cached.
    cuda_graph: from the third call with a size on, a step is one launch; False never captures.

    Raises `InvalidOption` for an unknown word and `UnsupportedModel` for anything but a FLUX.1 transformer.
    """
    config = CompileConfig(
        choice(Backend, backend, "backend"),
        choice(Attention, attention, "attention"),
        choice(BaseWeights, base_weights, "base_weights"),
        profile,
        rebuild_outside_profile,
        cache_folder,
        cuda_graph=cuda_graph,
    )
    transformer = _denoiser(pipe_or_transformer)
    if not isinstance(transformer, nn.Module):
        raise UnsupportedModel(
            f"{type(pipe_or_transformer).__name__} has no transformer.",
            expected="Pass a diffusers pipeline, or its transformer.",
        )
    if config.backend is Backend.MTTM:
        return _with_stock_module(pipe_or_transformer, transformer)
    from .compiled_flux import compile_flux
    from .schedule import Schedule

    return compile_flux(transformer, config, progress, Schedule(pipe_or_transformer))


def restore_transformer(pipe_or_transformer: Any) -> nn.Module:
    """The transformer as diffusers made it: base weights back bit for bit, its own class, nothing of ours left."""
    from .backends.mttm import stock_original
    from .compiled_flux import restore_flux

    transformer = _denoiser(pipe_or_transformer)
    original = stock_original(transformer)
    if original is not None:
        _replace(pipe_or_transformer, transformer, original)
        return original
    return restore_flux(transformer)


def _with_stock_module(pipe_or_transformer: Any, transformer: nn.Module) -> nn.Module:
    from .backends.mttm import stock_module

    wrapped = stock_module(transformer)
    _replace(pipe_or_transformer, transformer, wrapped)
    return wrapped


def _denoiser(pipe_or_transformer: Any) -> Any:
    """The pipeline's transformer, or its UNet (SDXL, Kandinsky); a model itself."""
    for name in ("transformer", "unet"):
        if (found := getattr(pipe_or_transformer, name, None)) is not None:
            return found
    return pipe_or_transformer


def _replace(pipe: Any, old: nn.Module, new: nn.Module) -> None:
    for name in ("transformer", "unet"):
        if getattr(pipe, name, None) is old:
            setattr(pipe, name, new)


def architecture_of(model: Any) -> FluxArchitecture:
    """Read from attributes: diffusers widens a model for a control LoRA without changing the config's items."""
    config = {name: getattr(model.config, name, value) for name, value in model.config.items()}
    return FluxArchitecture.from_diffusers_config({**config, "out_channels": model.out_channels})


@functools.cache
def flux_class() -> type[nn.Module]:
    """diffusers' FLUX transformer class; raises `InvalidOption` where diffusers is missing."""
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        raise InvalidOption("diffusers is not installed.", fix="pip install diffusers") from error
    return FluxTransformer2DModel
