"""A LoRA file, read and checked: what it is, and its patches to BFL weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InvalidFile, LoraMismatch
from .changes import Patch
from .keys import read_keys
from .targets import LoraFormat, Shapes

_log = logging.getLogger("trt_core.lora")
_PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl"}
_FOREIGN_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "It is a pickle or zip file"),
    (b"\x80", "It is a pickle file"),
    (b"GGUF", "It is a GGUF file"),
    (b"version https://git-lfs", "It is only a Git LFS pointer, the weights were not downloaded"),
    (b"<", "It is a web page, as a download that needs a login leaves behind"),
)
_WHY_NO_PICKLE = "Pickle files can run any program when they are opened."
_CONVERT = "Download the .safetensors version, or convert the file with a tool that you trust."
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """One LoRA file: its patches in the file's dtypes, on the CPU until `to`."""

    path: Path
    name: str
    patches: tuple[Patch, ...]
    format: LoraFormat
    ranks: tuple[int, ...]
    """The distinct ranks, ascending; empty for full differences."""
    text_encoder_keys: int
    """Tensors for CLIP or T5, which this library does not run."""
    size_bytes: int
    fingerprint: str
    """sha256 of the file's bytes."""
    metadata: Mapping[str, str]

    @property
    def weights(self) -> frozenset[str]:
        """The BFL names of the weights that this LoRA touches."""
        return frozenset(patch.weight for patch in self.patches)

    def to(self, device: torch.device | str) -> Lora:
        """The same LoRA with all factors on `device`, so that switching to it again copies nothing."""
        return replace(self, patches=tuple(patch.to(device) for patch in self.patches))


def load_lora(path: str | Path, shapes: Shapes) -> Lora:
    """The LoRA in the safetensors file `path`, for the architecture `shapes` (BFL weight name -> shape).

    Raises `InvalidFile` (missing, no safetensors, truncated, NaN or infinity in it, no LoRA) or
    `LoraMismatch` (made for another model). The file may be changed or deleted afterwards.
    """
    path = Path(path)
    size_bytes = _checked_size(path)
    try:
        tensors, metadata = _read(path)
        _require_finite(tensors)
        read = read_keys(tensors, shapes, metadata)
    except (InvalidFile, LoraMismatch) as error:
        named = type(error)(f"{path.name}: {error.what}", expected=error.expected, fix=error.fix, widget=error.widget)
        raise named from error
    ranks = tuple(sorted({patch.change.rank for patch in read.patches if patch.change.rank is not None}))
    lora = Lora(
        path,
        path.stem,
        read.patches,
        read.format,
        ranks,
        read.text_encoder_keys,
        size_bytes,
        fingerprint(path),
        metadata,
    )
    _report(lora)
    return lora


def fingerprint(path: str | Path) -> str:
    """The sha256 of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _checked_size(path: Path) -> int:
    if path.is_dir():
        raise InvalidFile(
            f"{path} is a folder.", expected="A LoRA is one .safetensors file.", fix="Choose the file in it."
        )
    try:
        with path.open("rb") as file:
            start = file.read(64)
        size_bytes = path.stat().st_size
    except OSError as error:
        raise InvalidFile(
            f"The LoRA file {path} cannot be read: {error.strerror or error}.",
            fix="Check the name and the folder.",
        ) from error
    if size_bytes == 0:
        raise InvalidFile(f"{path.name}: The file is empty.", fix="Download it again.")
    _refuse_foreign(path, start)
    return size_bytes


def _refuse_foreign(path: Path, start: bytes) -> None:
    pickle = path.suffix.lower() in _PICKLE_SUFFIXES
    # A safetensors file starts with the header's length in 8 bytes and a brace.
    if not pickle and start[8:9] == b"{":
        return
    found = next((text for magic, text in _FOREIGN_STARTS if start.lstrip().startswith(magic)), "")
    reasons = [f"{found}."] if found else []
    if pickle or "pickle" in found:
        reasons.append(_WHY_NO_PICKLE)
    raise InvalidFile(
        " ".join([f"{path.name}: This is not a safetensors file.", *reasons]),
        expected="LoRAs are read from .safetensors files only.",
        fix=_CONVERT,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Copies: a mapped file changes under us when a trainer saves over it, and Windows would lock it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise InvalidFile(
            f"The file is truncated or damaged ({error}).", fix="Download it again and compare its size."
        ) from error


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # aminmax reads once and allocates nothing; NaN and infinity both show in its result. It takes no FP8.
        low, high = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise InvalidFile(
                f"{key!r} contains NaN or infinity: every picture would be black or noise.",
                fix="The training failed or the file is damaged; use another version of this LoRA.",
            )


def _report(lora: Lora) -> None:
    ranks = f"{lora.ranks[0]}-{lora.ranks[-1]}" if len(lora.ranks) > 1 else "".join(map(str, lora.ranks)) or "none"
    _log.info(
        "TRT LoRA: %s, %s keys, %d weights, rank %s, %.1f MB",
        lora.name, lora.format.value, len(lora.weights), ranks, lora.size_bytes / 1e6,
    )  # fmt: skip
    if lora.text_encoder_keys:
        _log.info("TRT LoRA: %s has %d tensors for text encoders, not used here.", lora.name, lora.text_encoder_keys)
    if not lora.patches:
        _log.warning("TRT LoRA: %s changes nothing in the FLUX transformer.", lora.name)
