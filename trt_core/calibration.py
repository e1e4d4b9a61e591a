"""The largest input of each linear layer, seen while the model runs: what static FP8 scales are made of.

Equal to ModelOpt's `max` calibration, and without it. Only inputs need data; a weight's range is read off the weight.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidOption, UnsupportedModel
from .flux.architecture import FluxArchitecture
from .fp8_recipe import check_amax, diffusers_linears, is_modulation
from .host import Progress, stop_if_cancelled

_LOG = logging.getLogger("trt_core.fp8")
_STAGE = "Calibrating FP8"
_FEWEST_CALLS = 2
_FEW_PROMPTS = 4
_SENSIBLE = "16 to 128 different prompts with 20 steps each are usual"


@dataclass(frozen=True, slots=True)
class PromptCalibration:
    """Pictures to make for calibration, each of `steps` steps; nothing is decoded or kept."""

    prompts: tuple[str, ...]
    steps: int = 20
    height_px: int = 1024
    width_px: int = 1024
    guidance_scale: float = 3.5
    seed: int = 0
    txt_tokens: int = 512
    """diffusers' `max_sequence_length`; schnell allows 256."""


Recorded = Iterable[Mapping[str, Any]]
"""Keyword arguments of the transformer, one mapping per call, as `record_calls` writes them."""
ForwardLoop = Callable[[Any], object]
"""Runs the transformer that it is given over the calibration data, as ModelOpt's `forward_loop` does."""
Calibration = PromptCalibration | Sequence[str] | Recorded | ForwardLoop


@dataclass(frozen=True, slots=True)
class Feed:
    """`run(transformer)` shows it all calibration data; `calls` is how many forwards that takes, where known."""

    run: ForwardLoop
    calls: int | None


@dataclass(slots=True)
class Calls:
    """How often the transformer ran."""

    number: int = 0


def collect_input_amax(
    transformer: nn.Module, arch: FluxArchitecture, feed: Feed, progress: Progress, *, allow_few: bool = False
) -> dict[str, float]:
    """BFL name of each block linear (not of modulations) -> the largest absolute input it saw, exact in fp32.

    The model's weights and hooks are as before when this returns or raises. Maxima stay on the model's device until the
    end, so calibration runs at the model's own speed.

    Raises:
        InvalidOption: no call, a single one (unless `allow_few`), NaN, infinity or nothing but zeros in a layer.
        BuildCancelled: the user cancelled.
    """
    seen = _Seen(transformer, arch)
    with torch.no_grad(), counted(transformer, feed.calls, progress) as calls, seen.watching():
        feed.run(transformer)
    require_calls(calls.number, allow_few)
    amax = seen.amax()
    check_amax(arch, amax)
    _LOG.info("TRT FP8: calibrated %d layers in %d calls", len(amax), calls.number)
    return amax


def require_calls(calls: int, allow_few: bool) -> None:
    """Raises `InvalidOption` where calibration saw too little to be trusted."""
    if calls == 0:
        raise InvalidOption(
            "Calibration ran the transformer not once.",
            expected="Pass prompts, recorded inputs or a function that calls the model it is given.",
            fix=f"{_SENSIBLE}.",
            widget="calibration",
        )
    if calls < _FEWEST_CALLS and not allow_few:
        raise InvalidOption(
            "Calibration saw a single call of the transformer, so its ranges hold for one step of one picture.",
            expected=f"{_SENSIBLE}.",
            fix="Give more prompts or steps, or allow_few=True to use these ranges all the same.",
            widget="calibration",
        )


def feed_of(calibration: Calibration, pipe: Any) -> Feed:
    """The feed for anything that `quantize_fp8_` takes as calibration; only prompts need a pipeline as `pipe`."""
    if isinstance(calibration, str):
        calibration = (calibration,)
    if isinstance(calibration, PromptCalibration):
        return _prompt_feed(calibration, pipe)
    if isinstance(calibration, Mapping):
        raise _no_calibration("one call's arguments", "Put the recorded calls into a list.")
    if isinstance(calibration, Iterable):
        return _items_feed(calibration, pipe)
    if callable(calibration):
        return Feed(calibration, None)
    raise _no_calibration(type(calibration).__name__)


@contextmanager
def record_calls(transformer: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """A list that fills with the arguments of every call inside, tensors copied to host memory."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(transformer.forward)

    def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = signature.bind(*args, **kwargs).arguments
        calls.append({name: _host_copy(value) for name, value in given.items() if value is not None})

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def counted(transformer: nn.Module, total: int | None, progress: Progress) -> Iterator[Calls]:
    """Counts the transformer's calls inside, shows them, and stops at the next one when the user cancels."""
    calls = Calls()

    def before_call(_module: nn.Module, _args: tuple) -> None:
        stop_if_cancelled(progress, _STAGE)
        progress.update(_STAGE, calls.number, max(total or 0, calls.number + 1))
        calls.number += 1

    handle = transformer.register_forward_pre_hook(before_call)
    try:
        yield calls
    finally:
        handle.remove()
    progress.update(_STAGE, calls.number, calls.number)


class _Seen:
    """Running maxima per linear, as 0-dim fp32 tensors where the inputs lie."""

    def __init__(self, transformer: nn.Module, arch: FluxArchitecture) -> None:
        self._modules = {
            name: [_submodule(transformer, path) for path in paths]
            for name, paths in diffusers_linears(arch).items()
            if not is_modulation(name)
        }
        self._amax: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for name, modules in self._modules.items():
                hook = partial(self._watch, name)
                handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def amax(self) -> dict[str, float]:
        unseen = [name for name in self._modules if name not in self._amax]
        if unseen:
            raise InvalidOption(
                f"{len(unseen)} layers saw no input in calibration, the first is {unseen[0]}.",
                expected="Calibration runs every block as diffusers defines it.",
                fix="Switch caches off and call unfuse_qkv_projections() before calibrating.",
                widget="calibration",
            )
        return {name: float(amax) for name, amax in self._amax.items()}

    def _watch(self, name: str, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        if value.numel() == 0:
            return
        # aminmax allocates nothing of the input's size, and NaN survives it and maximum.
        low, high = torch.aminmax(value.detach())
        amax = torch.maximum(low.abs(), high.abs()).float()
        before = self._amax.get(name)
        self._amax[name] = amax if before is None else torch.maximum(before.to(amax.device), amax)


def _items_feed(items: Iterable[Any], pipe: Any) -> Feed:
    count = len(items) if isinstance(items, Sequence) else None
    rest = iter(items)
    first = next(rest, None)
    if first is None:
        require_calls(0, allow_few=False)
    if isinstance(first, str):
        return _prompt_feed(PromptCalibration((first, *rest)), pipe)
    return Feed(partial(_run_samples, itertools.chain([first], rest)), count)


def _run_samples(samples: Recorded, transformer: nn.Module) -> None:
    signature = inspect.signature(transformer.forward)
    for index, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise _no_calibration(f"{type(sample).__name__} as sample {index}")
        try:
            signature.bind(**sample)
        except TypeError as error:
            raise InvalidOption(
                f"Calibration sample {index} does not fit the transformer: {error}.",
                expected="Each sample holds the keyword arguments of one call.",
                widget="calibration",
            ) from error
        transformer(**{name: _moved(value, transformer) for name, value in sample.items()})


def _prompt_feed(wanted: PromptCalibration, pipe: Any) -> Feed:
    if not wanted.prompts:
        require_calls(0, allow_few=False)
    if not all(isinstance(prompt, str) for prompt in wanted.prompts):
        raise _no_calibration("prompts that are not all texts")
    if not hasattr(pipe, "transformer"):
        raise InvalidOption(
            "Calibration by prompts needs the whole pipeline, to encode texts and to denoise.",
            fix="Pass the pipeline instead of its transformer, or recorded inputs instead of prompts.",
            widget="calibration",
        )
    if len(wanted.prompts) < _FEW_PROMPTS:
        _LOG.warning("TRT FP8: calibrating with %d prompts; %s", len(wanted.prompts), _SENSIBLE)
    return Feed(partial(_run_prompts, wanted, pipe), len(wanted.prompts) * wanted.steps)


def _run_prompts(wanted: PromptCalibration, pipe: Any, transformer: nn.Module) -> None:
    own = pipe.transformer
    pipe.transformer = transformer
    try:
        for index, prompt in enumerate(wanted.prompts):
            pipe(
                prompt=prompt, num_inference_steps=wanted.steps, height=wanted.height_px, width=wanted.width_px,
                guidance_scale=wanted.guidance_scale, max_sequence_length=wanted.txt_tokens, output_type="latent",
                generator=torch.Generator("cpu").manual_seed(wanted.seed + index),
            )  # fmt: skip
    finally:
        pipe.transformer = own


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModel(f"The model has no {path}.", expected="A FLUX.1 transformer has it.") from error


def _moved(value: Any, transformer: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, transformer) for item in value)
    return value.to(transformer.device) if isinstance(value, Tensor) else value


def _host_copy(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_host_copy(item) for item in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _no_calibration(seen: str, fix: str = "") -> InvalidOption:
    return InvalidOption(
        f"Calibration got {seen}.",
        expected="It takes a list of prompts, a PromptCalibration, a list of recorded calls (dicts of the "
        "transformer's arguments), or a function of the transformer.",
        fix=fix,
        widget="calibration",
    )
