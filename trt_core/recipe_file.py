"""A recipe as one safetensors file, so that nothing is calibrated twice; read without ModelOpt and without a model.

One file, not two: ranges and mean inputs are its tensors (`<linear>.input_amax`, fp32, 0-dim; `<linear>.input_mean`,
fp32 [K]) and everything else is JSON in its metadata, so neither can be lost, renamed or mixed up without the other.
For FLUX.1-dev that is 6 MB, or about 30 KB without means, which version 1 of the format had none of.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic_files import write_atomic
from .errors import InvalidFile, InvalidOption
from .flux.architecture import FluxArchitecture
from .fp8_recipe import Activations, Fp8Config, Fp8Recipe, Granularity, check_recipe

_LOG = logging.getLogger("trt_core.fp8")
_FORMAT = "trt_core.fp8_recipe"
VERSION = 2
_READABLE = ("1", str(VERSION))
_AMAX, _MEAN = ".input_amax", ".input_mean"


def save_recipe(path: str | Path, recipe: Fp8Recipe, arch: FluxArchitecture) -> Path:
    """Writes (or replaces) the file `path`, whole or not at all; ranges and means are rounded to fp32.

    Raises `InvalidOption` where the recipe is of another model, and `InvalidFile` where nothing can be written.
    """
    check_recipe(recipe, arch)
    path = Path(path)
    try:
        write_atomic(path, save(_tensors(recipe), metadata=_metadata(recipe, arch)))
    except OSError as error:
        raise InvalidFile(
            f"The FP8 recipe cannot be written to {path}: {error.strerror or error}.", fix="Choose another folder."
        ) from error
    _LOG.info("TRT FP8: recipe of %d layers saved to %s", len(recipe.linears), path)
    return path


def load_recipe(path: str | Path, arch: FluxArchitecture) -> Fp8Recipe:
    """The recipe in the file `path`.

    Models of equal numbers (FLUX.1-dev, Krea and Kontext) take each other's recipes; all others are refused.

    Raises `InvalidFile`: missing, no safetensors, truncated, of another format version, of another architecture, with
    ranges that no scale can be made from, or with means that are no numbers or do not fit.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if metadata.get("format") != _FORMAT:
        raise InvalidFile(
            f"{path.name} holds no FP8 recipe.", fix="Choose a file that save_recipe() or FP8 Quantize wrote."
        )
    if metadata.get("version") not in _READABLE:
        raise InvalidFile(
            f"{path.name} has format version {metadata.get('version')}.",
            expected=f"This program reads versions {' and '.join(_READABLE)}.",
            fix="Update the program, or calibrate again.",
        )
    try:
        recipe = _parsed(tensors, metadata)
        made_for = json.loads(metadata["architecture"])
    except (KeyError, TypeError, ValueError, RuntimeError, InvalidOption) as error:
        raise InvalidFile(f"{path.name} is damaged ({error}).", fix="Calibrate again.") from error
    _require_same(path, made_for, _numbers(arch))
    try:
        check_recipe(recipe, arch)
    except InvalidOption as error:
        raise InvalidFile(f"{path.name}: {error.what}", expected=error.expected, fix="Calibrate again.") from error
    return recipe


def _tensors(recipe: Fp8Recipe) -> dict[str, Tensor]:
    """What the file holds as tensors; each has memory of its own, which safetensors asks for."""
    amax = {name + _AMAX: torch.tensor(amax, dtype=torch.float32) for name, amax in recipe.input_amax.items()}
    means = {
        name + _MEAN: mean.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, mean in recipe.input_mean.items()
    }
    return amax | means


def _metadata(recipe: Fp8Recipe, arch: FluxArchitecture) -> dict[str, str]:
    config = recipe.config
    return {
        "format": _FORMAT,
        "version": str(VERSION),
        "architecture": json.dumps(_numbers(arch), sort_keys=True),
        "config": json.dumps(
            {
                "granularity": config.granularity.value,
                "activations": config.activations.value,
                "exclude": config.exclude,
                "headroom": config.headroom,
            }
        ),
        "linears": json.dumps(sorted(recipe.linears)),
    }


def _parsed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Fp8Recipe:
    config = json.loads(metadata["config"])
    means = {name.removesuffix(_MEAN): tensor.float() for name, tensor in tensors.items() if name.endswith(_MEAN)}
    return Fp8Recipe(
        Fp8Config(
            Granularity(config["granularity"]),
            Activations(config["activations"]),
            tuple(config["exclude"]),
            float(config["headroom"]),
        ),
        frozenset(json.loads(metadata["linears"])),
        {name.removesuffix(_AMAX): tensor.item() for name, tensor in tensors.items() if not name.endswith(_MEAN)},
        means,
    )


def _numbers(arch: FluxArchitecture) -> dict[str, Any]:
    return {**asdict(arch), "axes_dim": list(arch.axes_dim)}


def _require_same(path: Path, made_for: dict[str, Any], here: dict[str, Any]) -> None:
    other = sorted(name for name in here if not isinstance(made_for, dict) or made_for.get(name) != here[name])
    if other:
        name = other[0]
        theirs = made_for.get(name) if isinstance(made_for, dict) else made_for
        raise InvalidFile(
            f"{path.name} was made for another model: its {name} is {theirs}, this model's is {here[name]}.",
            fix="Calibrate this model, or choose the file that was made with it.",
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise InvalidFile(f"There is no FP8 recipe at {path}.", fix="Check the name and the folder.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise InvalidFile(
            f"{path.name} is truncated, damaged or no safetensors file ({error}).", fix="Calibrate again."
        ) from error
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror or error}.") from error
