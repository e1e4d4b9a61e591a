"""Choices a user can make, as frozen dataclasses and enums. Strings become enums here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from .errors import InvalidOption

PIXELS_PER_TOKEN = 16
"""One image token covers 16 x 16 px: the VAE scales by 8 and FLUX packs 2 x 2 latent pixels into a token."""

_Choice = TypeVar("_Choice", bound=Enum)


class Backend(Enum):
    """What runs a segment. `AUTO` measures the others on this GPU and keeps the fastest."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    INDUCTOR = "inductor"
    EAGER = "eager"
    MTTM = "mttm"
    """The stock `MutableTorchTensorRTModule`, for models that have no segments here."""


class Attention(Enum):
    """Which kernel computes attention between segments. `AUTO` measures them."""

    AUTO = "auto"
    CUDNN = "cudnn"
    FLASH = "flash"
    FLASH3 = "flash3"
    """FlashAttention-3, where it is installed (`fa3-fwd`): Hopper GPUs, bf16."""
    EFFICIENT = "efficient"
    MATH = "math"
    FP8 = "fp8"
    """q, k, v and probabilities in E4M3, by cuDNN: for FP8 models, where it is faster and exact enough."""


class Layout(Enum):
    """How a block is cut: two segments with attention between them, or one segment with attention inside."""

    SPLIT = "split"
    WHOLE = "whole"


class BaseWeights(Enum):
    """Where the unchanged weights of LoRA-touched layers are kept. `AUTO` decides from free GPU memory."""

    AUTO = "auto"
    GPU = "gpu"
    HOST = "host"


def choice(enum: type[_Choice], value: str | _Choice, option: str) -> _Choice:
    """`value` as a member of `enum`; raises `InvalidOption` that names `option` and the allowed words."""
    if isinstance(value, enum):
        return value
    try:
        return enum(value)
    except ValueError as error:
        allowed = ", ".join(repr(member.value) for member in enum)
        raise InvalidOption(
            f"{option}={value!r} does not exist.", expected=f"Use one of {allowed}.", widget=option
        ) from error


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Inclusive range of one axis; engines are tuned for `opt`."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 < self.min <= self.opt <= self.max:
            raise InvalidOption(f"A range needs 0 < min <= opt <= max, got {self.min}, {self.opt}, {self.max}.")

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def widened(self, size: int) -> ShapeRange:
        """The smallest range that holds this one and `size`; `opt` becomes `size`."""
        return ShapeRange(min(self.min, size), size, max(self.max, size))


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes that engines accept: image tokens, text tokens and batch.

    A 1024 x 1024 px image has 4096 image tokens; reference images (Kontext) add theirs.
    """

    img_tokens: ShapeRange
    txt_tokens: ShapeRange
    batch: ShapeRange

    @classmethod
    def around(cls, batch: int, img_tokens: int, txt_tokens: int) -> Profile:
        """A profile tuned for one call's shapes that also takes 256 px to 2048 px images and batch 1 to 4."""
        return cls(
            ShapeRange(min(256, img_tokens), img_tokens, max(16384, img_tokens)),
            ShapeRange(1, txt_tokens, max(1024, txt_tokens)),
            ShapeRange(1, batch, max(4, batch)),
        )

    def holds(self, batch: int, img_tokens: int, txt_tokens: int) -> bool:
        return batch in self.batch and img_tokens in self.img_tokens and txt_tokens in self.txt_tokens

    def widened(self, batch: int, img_tokens: int, txt_tokens: int) -> Profile:
        return Profile(
            self.img_tokens.widened(img_tokens),
            self.txt_tokens.widened(txt_tokens),
            self.batch.widened(batch),
        )


def image_tokens(height_px: int, width_px: int) -> int:
    """Image tokens of a picture; raises `InvalidOption` unless both sides are multiples of 16 px."""
    for axis, side_px in (("height", height_px), ("width", width_px)):
        if side_px <= 0 or side_px % PIXELS_PER_TOKEN:
            nearest = max(PIXELS_PER_TOKEN, round(side_px / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN)
            raise InvalidOption(
                f"The image {axis} is {side_px} px.",
                expected=f"FLUX needs multiples of {PIXELS_PER_TOKEN} px.",
                fix=f"Use {nearest} px.",
                widget=axis,
            )
    return (height_px // PIXELS_PER_TOKEN) * (width_px // PIXELS_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """What the user asked for. Nothing here is in a cache key by itself; segments carry what changes their bytes."""

    backend: Backend = Backend.AUTO
    attention: Attention = Attention.AUTO
    base_weights: BaseWeights = BaseWeights.AUTO
    profile: Profile | None = None
    """None: made around the shapes of the first call."""
    rebuild_outside_profile: bool = True
    """False: a shape outside the profile raises `ShapeOutsideProfile` instead of building again."""
    cache_folder: str | None = None
    """None: the user's cache folder, or TRT_CORE_CACHE."""
    error_ratio_bound: float = field(default=1.5)
    """A compiled segment's error against fp32 may be this many times that of eager PyTorch in the same dtype."""
    cuda_graph: bool = True
    """False: every step launches its kernels one by one, also where a CUDA graph of the whole step could."""
