"""The largest input of each linear layer and its mean one, seen while the model runs: what static FP8 scales are made
of, and what the correction of biases needs.

Ranges are equal to ModelOpt's `max` calibration, and made without it. Only inputs need data; a weight's range is read
off the weight.
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
from .fp8_recipe import diffusers_linears, is_modulation
from .host import Progress, stop_if_cancelled
from .input_ranges import InputRanges, RunningRanges

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


def collect_input_ranges(
    transformer: nn.Module, arch: FluxArchitecture, feed: Feed, progress: Progress, *, allow_few: bool = False
) -> InputRanges:
    """The largest and the mean input of each block linear but modulations, over all calibration data in one pass.

    Whether scales can be made of them, `plan_recipe` says. The model's weights and hooks are as before when this
    returns or raises. Maxima and sums stay on the model's device until the end, so calibration runs at the model's own
    speed.

    Raises:
        InvalidOption: no call, a single one (unless `allow_few`), or a layer that saw no input.
        BuildCancelled: the user cancelled.
    """
    seen = _Seen(transformer, arch)
    with torch.no_grad(), counted(transformer, feed.calls, progress) as calls, seen.watching():
        feed.run(transformer)
    require_calls(calls.number, allow_few)
    found = seen.ranges()
    _LOG.info("TRT FP8: calibrated %d layers in %d calls", len(found.amax), calls.number)
    return found


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
    """Watches the modules of every linear. They share one input, so only the first of them counts for the mean."""

    def __init__(self, transformer: nn.Module, arch: FluxArchitecture) -> None:
        self._modules = {
            name: [_submodule(transformer, path) for path in paths]
            for name, paths in diffusers_linears(arch).items()
            if not is_modulation(name)
        }
        self._running = RunningRanges()

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for name, modules in self._modules.items():
                for module in modules:
                    hook = partial(self._watch, name, module is modules[0])
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ranges(self) -> InputRanges:
        unseen = self._running.without_input(self._modules)
        if unseen:
            raise InvalidOption(
                f"{len(unseen)} layers saw no input in calibration, the first is {unseen[0]}.",
                expected="Calibration runs every block as diffusers defines it.",
                fix="Switch caches off and call unfuse_qkv_projections() before calibrating.",
                widget="calibration",
            )
        return self._running.ranges()

    def _watch(self, name: str, is_first: bool, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        if value.numel() == 0:
            return
        self._running.add_amax(name, value)
        if is_first:
            self._running.add_mean(name, value)


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
