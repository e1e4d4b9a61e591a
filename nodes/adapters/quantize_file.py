"""Writes the scaled FP8 file that ComfyUI's own loader opens: one layer at a time, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import comfy.lora
import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...trt_core.atomic_files import replace, sync_folder, temporary
from ...trt_core.errors import InvalidFile, InvalidOption
from ...trt_core.fp8_recipe import Fp8Recipe
from ...trt_core.host import Progress, stop_if_cancelled
from . import weights
from .quantize import recipe_of
from .quantize_copy import layer_tensors, metadata

FOLDER = "diffusion_models"
_STAGE = "Writing FP8 model"
_SUFFIX = ".safetensors"
_WORKING_BYTES = 2**30
_FORBIDDEN = set('<>:"|?*\0')
_DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A few tensors of the file: what the header has to know of them, and how to make them."""

    outlines: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Saved:
    path: Path
    size_bytes: int
    layers: int
    patched: int
    """Weights that a LoRA changed before they were written."""


def save_fp8(patcher: Any, name: str, overwrite: bool, progress: Progress) -> Saved:
    """Writes the model with the recipe that FP8 Quantize left on it, its LoRAs merged, below models/diffusion_models.

    Raises `InvalidOption` for a model without a recipe, a name that is none, or a file that is there already, and
    `InvalidFile` where the disk refuses; nothing is left behind then, or after a cancel.
    """
    weights.require_flux(patcher)
    recipe, path = _recipe(patcher), target(name)
    if path.exists() and not overwrite:
        raise InvalidOption(
            f"{path.name} exists already.", fix="Choose another name, or switch overwrite on.", widget="filename"
        )
    pieces = _pieces(patcher, recipe)
    comfy.model_management.free_memory(_WORKING_BYTES, patcher.load_device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, pieces, metadata(recipe), progress)
    except OSError as error:
        raise InvalidFile(
            f"{path.name} cannot be written ({error.strerror or error}).",
            fix="Look whether the disk has room and the folder may be written.",
        ) from error
    patched = sum(key in patcher.patches for key in weights.all_weights(weights.flux_of(patcher)).values())
    return Saved(path, path.stat().st_size, len(recipe.linears), patched)


def target(name: str) -> Path:
    """The file for a name, which may have folders in it but never leads out of models/diffusion_models."""
    stem = name.strip().removesuffix(_SUFFIX).replace("\\", "/")
    parts = stem.split("/")
    bad = any(part in ("", ".", "..") or part != part.strip() or _FORBIDDEN & set(part) for part in parts)
    if bad or any(part.startswith(".") for part in parts):
        raise InvalidOption(
            f"{name!r} is no file name.", expected="A name such as flux1-dev-fp8 or flux/dev-fp8.", widget="filename"
        )
    return Path(_folder(), *parts[:-1], parts[-1] + _SUFFIX)


def _folder() -> Path:
    """Where ComfyUI looks for such files: of several folders the first called so, before its old "unet"."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return next((folder for folder in folders if folder.name == FOLDER), folders[0])


def _recipe(patcher: Any) -> Fp8Recipe:
    recipe = recipe_of(patcher)
    if recipe is None:
        raise InvalidOption(
            "This model has no FP8 recipe.", expected="FP8 Quantize decides which layers become FP8.",
            fix="Put FP8 Quantize between the loader and this node.", widget="model",
        )  # fmt: skip
    return recipe


def _pieces(patcher: Any, recipe: Fp8Recipe) -> list[Piece]:
    keys = weights.all_weights(weights.flux_of(patcher))
    return [_piece(patcher, recipe, name, key) for name, key in keys.items()]


def _piece(patcher: Any, recipe: Fp8Recipe, name: str, key: str) -> Piece:
    shape, layer = _shape(patcher, key), name.removesuffix(".weight")
    if layer not in recipe.linears:
        dtype = weights.compute_dtype(patcher)
        return Piece({name: (dtype, shape)}, lambda: {name: merged_weight(patcher, key).to(dtype)})
    outlines: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {name: (torch.float8_e4m3fn, shape)}
    outlines[f"{layer}.weight_scale"] = (torch.float32, ())
    if layer in recipe.input_amax:
        outlines[f"{layer}.input_scale"] = (torch.float32, ())
    return Piece(outlines, lambda: layer_tensors(layer, merged_weight(patcher, key), recipe))


def merged_weight(patcher: Any, key: str) -> Tensor:
    """The weight with the patcher's LoRAs in fp32, or without any in the compute dtype, on the patcher's device."""
    patches = patcher.patches.get(key)
    dtype = torch.float32 if patches else weights.compute_dtype(patcher)
    weight = weights.read_base(patcher, key, patcher.load_device, dtype)
    return comfy.lora.calculate_weight(list(patches), weight, key) if patches else weight


def _shape(patcher: Any, key: str) -> tuple[int, ...]:
    weight, patches = weights.raw_base(patcher, key), patcher.patches.get(key)
    return tuple(comfy.lora.calculate_shape(patches, weight, key) if patches else weight.shape)


def _write(path: Path, pieces: list[Piece], facts: dict[str, str], progress: Progress) -> None:
    staging, complete = temporary(path.parent), False
    places = _places(pieces)
    head = header(pieces, places, facts)
    try:
        with staging.open("xb") as file:
            file.write(head)
            for piece in _shown(pieces, progress):
                _write_piece(file, piece, places, len(head))
            file.flush()
            os.fsync(file.fileno())
        stop_if_cancelled(progress, _STAGE)
        replace(staging, path)
        complete = True
    finally:
        if not complete:
            with suppress(OSError):
                staging.unlink()
    sync_folder(path.parent)


def _shown(pieces: list[Piece], progress: Progress) -> Iterator[Piece]:
    for done, piece in enumerate(pieces):
        stop_if_cancelled(progress, _STAGE)
        progress.update(_STAGE, done, len(pieces))
        yield piece
    progress.update(_STAGE, len(pieces), len(pieces))


def _places(pieces: list[Piece]) -> dict[str, tuple[int, int]]:
    """Name -> first and last byte behind the header. Scales come last: ComfyUI maps the file into memory, and a matrix
    at an odd address is slow to multiply and to copy."""
    outlines = {name: outline for piece in pieces for name, outline in piece.outlines.items()}
    places, start = {}, 0
    for name, (dtype, shape) in sorted(outlines.items(), key=lambda item: not item[1][1]):
        places[name] = (start, start + dtype.itemsize * math.prod(shape))
        start = places[name][1]
    return places


def header(pieces: list[Piece], places: dict[str, tuple[int, int]], facts: dict[str, str]) -> bytes:
    """The beginning of a safetensors file: the header's length, then JSON padded with spaces to 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **facts}}
    for piece in pieces:
        for name, (dtype, shape) in piece.outlines.items():
            entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": list(places[name])}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _write_piece(file: BinaryIO, piece: Piece, places: dict[str, tuple[int, int]], data_start: int) -> None:
    tensors = piece.make()
    for name, (dtype, shape) in piece.outlines.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
        file.seek(data_start + places[name][0])
        file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
