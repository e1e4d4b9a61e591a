"""Which linear layers run in FP8, and what is known of their inputs: a recipe, planned without touching a weight.

FP8 is E4M3 here: values up to 448, each rounded by up to 6 %, whatever its size. Modulations are eight-bit integers
(`flux.storage`), because nothing multiplies them in FP8. Names are BFL's, without ".weight":
`double_blocks.0.img_attn.qkv`, `single_blocks.3.linear1`, `single_blocks.3.modulation.lin`.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .calibrated_numbers import (
    check_amax,
    check_means,
    input_widths,
    kept_amax,
    kept_means,
    refuse_amax,
    refuse_other_means,
    require_every_amax,
    require_every_mean,
)
from .errors import InvalidOption
from .flux.architecture import FluxArchitecture
from .flux.weights import diffusers_parts, weight_shapes

_LOG = logging.getLogger("trt_core.fp8")

E4M3_MAX = 448.0
"""The largest number of E4M3 (`torch.float8_e4m3fn`)."""
MAX_HEADROOM = 64.0
"""Beyond this, an ordinary activation (a thousandth of amax) would lie below E4M3's normal numbers."""
_ATTRIBUTE = "_trt_fp8"
_MODULATIONS = ("_mod.lin", ".modulation.lin")


class Granularity(Enum):
    """How many scales a tensor has."""

    TENSOR = "tensor"
    ROW = "row"
    """One per output channel of the weight, and one per token of an activation whose scale is dynamic."""


class Activations(Enum):
    """Where the scale of an activation comes from."""

    DYNAMIC = "dynamic"
    """From its own amax, at each call."""
    STATIC = "static"
    """From calibration: one number per layer, also where weights have a scale per row."""


@dataclass(frozen=True, slots=True)
class Fp8Config:
    """What the user chooses.

    `exclude` are patterns (`*`, `?`, `[...]`) of layers that stay in bf16, on BFL's or diffusers' names. `headroom`
    multiplies a calibrated amax: E4M3's relative error does not grow with it, and a LoRA may drive a layer further
    than calibration saw.
    """

    granularity: Granularity = Granularity.ROW
    activations: Activations = Activations.DYNAMIC
    exclude: tuple[str, ...] = ()
    headroom: float = 2.0

    def __post_init__(self) -> None:
        _require_member(Granularity, self.granularity, "granularity")
        _require_member(Activations, self.activations, "activations")
        if not isinstance(self.exclude, tuple) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise InvalidOption(
                f"exclude={self.exclude!r} is no tuple of patterns.",
                fix="Write exclude=('single_blocks.*.linear2',), with the comma.",
                widget="exclude",
            )
        if not 1.0 <= self.headroom <= MAX_HEADROOM:  # false for NaN too
            raise InvalidOption(
                f"headroom={self.headroom} is out of range.",
                expected=f"It multiplies the calibrated range: 1 to {MAX_HEADROOM:g}.",
                fix="Use 2, which leaves room for LoRAs.",
                widget="headroom",
            )


@dataclass(frozen=True, slots=True)
class Fp8Recipe:
    """The linear layers in FP8 and what calibration saw of their inputs: the largest one where activations are static,
    and the mean where biases are to be corrected.

    Modulations are stored in eight bits but multiply unquantized activations, so they are in `linears` and never in
    `input_amax` or `input_mean`. `==` leaves the means out; `same_recipe` does not.
    """

    config: Fp8Config
    linears: frozenset[str]
    input_amax: Mapping[str, float] = field(default_factory=dict, hash=False)
    input_mean: Mapping[str, Tensor] = field(default_factory=dict, hash=False, compare=False, repr=False)
    """Linear -> its mean input over all tokens and calls, fp32 [K] on the CPU; of all `activation_linears`, or empty:
    then no bias is corrected."""

    @property
    def activation_linears(self) -> frozenset[str]:
        """The linears whose input is quantized too: all but modulations."""
        return frozenset(name for name in self.linears if not is_modulation(name))

    def quantizes(self, weight: str) -> bool:
        """Whether `weight` ("double_blocks.0.img_attn.qkv.weight") is the matrix of one of these layers."""
        layer, _, kind = weight.rpartition(".")
        return kind == "weight" and layer in self.linears

    def corrects(self, bias: str) -> bool:
        """Whether `bias` ("double_blocks.0.img_attn.qkv.bias") is that of a layer whose mean input is known."""
        layer, _, kind = bias.rpartition(".")
        return kind == "bias" and layer in self.input_mean

    def input_limit(self, name: str) -> float:
        """The largest input of a layer that its static scale can hold; `InvalidOption` where the scale is dynamic."""
        if name not in self.input_amax:
            raise InvalidOption(
                f"{name} has no static input scale.",
                expected="Only layers of a static recipe have one, and modulations never do.",
            )
        return self.input_amax[name] * self.config.headroom

    def input_scale(self, name: str) -> float:
        """What the input of a layer is divided by to become E4M3: amax * headroom / 448."""
        return self.input_limit(name) / E4M3_MAX


def plan_recipe(
    arch: FluxArchitecture, config: Fp8Config, input_amax: Mapping[str, float] | None = None,
    input_mean: Mapping[str, Tensor] | None = None,
) -> Fp8Recipe:  # fmt: skip
    """The recipe for a model: all linears of all blocks in FP8 but the excluded; stem and final layer never are.

    `input_amax` (linear -> largest absolute input) is needed for static activations only. `input_mean` (linear -> mean
    input [K]) is for the correction of biases, with either kind. What they have for modulations or excluded layers is
    left out, so that one calibration serves other patterns too.

    Raises `InvalidOption`: a pattern matches nothing or all, or a table is of another model, incomplete, or holds
    infinity, NaN or, of amax, zero.
    """
    excluded = excluded_linears(arch, config.exclude)
    linears = frozenset(block_linears(arch)) - excluded
    if not linears:
        raise InvalidOption(
            "The exclude patterns leave no layer for FP8.", fix="Use fewer patterns, or no FP8.", widget="exclude"
        )
    if excluded:
        _LOG.info("TRT FP8: stays in bf16: %s", kinds_of(sorted(excluded)))
    layers = Fp8Recipe(config, linears).activation_linears
    dynamic = config.activations is Activations.DYNAMIC
    if dynamic:
        refuse_amax(input_amax)
    amax = {} if dynamic else kept_amax(arch, layers, input_amax)
    return Fp8Recipe(config, linears, amax, kept_means(arch, layers, input_mean))


def block_linears(arch: FluxArchitecture) -> tuple[str, ...]:
    """BFL names of every linear layer in the blocks, modulations included, in order of execution."""
    return tuple(input_widths(arch))


def is_modulation(name: str) -> bool:
    """Whether a linear computes shifts, scales and gates; it multiplies one row per picture."""
    return name.endswith(_MODULATIONS)


def diffusers_linears(arch: FluxArchitecture) -> dict[str, tuple[str, ...]]:
    """BFL name of each block linear -> the diffusers modules whose rows it holds; all of them share one input."""
    parts = diffusers_parts(arch)
    return {name: _modules(parts, name) for name in block_linears(arch)}


def excluded_linears(arch: FluxArchitecture, patterns: tuple[str, ...]) -> frozenset[str]:
    """The block linears that a pattern takes out, by BFL's or diffusers' name; a fused one if any part matches.

    A pattern may also match only stem or final layer, which are in bf16 anyway; raises `InvalidOption` for one that
    matches no layer at all.
    """
    parts = diffusers_parts(arch)
    spellings = {name: (name, *_modules(parts, name)) for name in _all_linears(arch)}
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name, words in spellings.items() if any(fnmatchcase(word, pattern) for word in words)}
        if not found:
            raise _matches_nothing(pattern, [word for words in spellings.values() for word in words])
        matched |= found
    return frozenset(matched.intersection(block_linears(arch)))


def check_recipe(recipe: Fp8Recipe, arch: FluxArchitecture) -> None:
    """Raises `InvalidOption` for a recipe that was not made for a model of these numbers, or is incomplete."""
    foreign = sorted(recipe.linears - set(block_linears(arch)))
    if foreign or not recipe.linears:
        raise InvalidOption(
            f"The FP8 recipe is of another model: it names {foreign[0]}." if foreign else "The FP8 recipe is empty.",
            expected=f"This model has {arch.double_depth} double and {arch.single_depth} single blocks.",
            fix="Calibrate this model, or load the recipe that was made with it.",
        )
    check_amax(arch, recipe.input_amax)
    check_means(arch, recipe.input_mean)
    if recipe.config.activations is Activations.DYNAMIC:
        refuse_amax(recipe.input_amax)
    else:
        require_every_amax(recipe.activation_linears, recipe.input_amax)
    refuse_other_means(recipe.activation_linears, recipe.input_mean)
    require_every_mean(recipe.activation_linears, recipe.input_mean)


def same_recipe(one: Fp8Recipe | None, other: Fp8Recipe | None) -> bool:
    """Whether two recipes make the same weights and biases: equal, mean inputs included, to the bit."""
    if one is None or other is None or one is other:
        return one is other
    mine, theirs = one.input_mean, other.input_mean
    return one == other and mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def left_in_bf16(arch: FluxArchitecture, recipe: Fp8Recipe) -> tuple[str, ...]:
    """The block linears that the recipe does not take, in order of execution."""
    return tuple(name for name in block_linears(arch) if name not in recipe.linears)


def kinds_of(names: Iterable[str]) -> str:
    """Names for people: "single_blocks.*.linear2 (38)", each kind of layer with how many of it there are."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    return ", ".join(f"{kind} ({count})" for kind, count in counts.items())


def attach_recipe(transformer: object, recipe: Fp8Recipe) -> None:
    """Leaves the recipe on a diffusers transformer for `compile_transformer`; it is in no state_dict and no config."""
    object.__setattr__(transformer, _ATTRIBUTE, recipe)
    _LOG.info(
        "TRT FP8: %d layers, scales per %s, %s activations",
        len(recipe.linears), recipe.config.granularity.value, recipe.config.activations.value,
    )  # fmt: skip


def attached_recipe(transformer: object) -> Fp8Recipe | None:
    """The recipe that `quantize_fp8_` left on a transformer, or None."""
    return vars(transformer).get(_ATTRIBUTE)


def detach_recipe(transformer: object) -> Fp8Recipe | None:
    """Removes the recipe from a transformer and returns it; None where there is none."""
    return vars(transformer).pop(_ATTRIBUTE, None)


def _require_member(enum: type[Enum], value: object, option: str) -> None:
    if not isinstance(value, enum):
        allowed = ", ".join(str(member) for member in enum)
        raise InvalidOption(f"{option}={value!r} does not exist.", expected=f"Use {allowed}.", widget=option)


def _matches_nothing(pattern: str, words: list[str]) -> InvalidOption:
    close = difflib.get_close_matches(pattern, words, n=1, cutoff=0.5)
    return InvalidOption(
        f"The exclude pattern {pattern!r} matches no layer.",
        expected="Layers are called single_blocks.0.linear2 or single_transformer_blocks.0.proj_out; * stands for "
        "anything.",
        fix=f"Did you mean {close[0]!r}?" if close else "",
        widget="exclude",
    )


def _all_linears(arch: FluxArchitecture) -> list[str]:
    return [name.removesuffix(".weight") for name, shape in weight_shapes(arch).items() if len(shape) == 2]


def _modules(parts: Mapping[str, tuple], name: str) -> tuple[str, ...]:
    return tuple(part.source.removesuffix(".weight") for part in parts[f"{name}.weight"])
