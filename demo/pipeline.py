"""The pipeline that the demo drives, loaded by diffusers' own code, and LoRA files that are sure to fit it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from safetensors import SafetensorError

from trt_core import load_lora
from trt_core.errors import InvalidFile, LoraMismatch, UnsupportedModel
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.weights import weight_shapes

HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
TEXT_TO_IMAGE = ("FluxPipeline", "FluxKontextPipeline")


def quiet() -> None:
    """Leaves the screen to the demo: no bars and no warnings of the libraries below, only errors."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("trt_core").setLevel(logging.WARNING)


def load(model: str, dtype: torch.dtype) -> FluxPipeline:
    """The pipeline in host memory. Raises `InvalidFile` if it cannot be read, `UnsupportedModel` if it is not FLUX."""
    if not Path(model).is_dir() and not HUB_NAME.fullmatch(model):
        found = "is a single file" if Path(model).is_file() else "does not exist"
        raise InvalidFile(
            f"{model} {found}.", fix="Pass the folder of a pipeline that diffusers saved.", widget="model"
        )
    try:
        name = FluxPipeline.load_config(model).get("_class_name")
        if name not in TEXT_TO_IMAGE:
            raise UnsupportedModel(
                f"{model} is a {name}.", expected=f"The demo needs one of {', '.join(TEXT_TO_IMAGE)}.", widget="model"
            )
        pipe = FluxPipeline.from_pretrained(model, torch_dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise InvalidFile(
            f"{model} could not be loaded: {str(error).splitlines()[0]}",
            expected="It has to be the folder of a pipeline that diffusers saved, or its name on the Hugging Face hub.",
            fix="Check the path; models behind a licence also need a login (`hf auth login`).",
            widget="model",
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_loras(pipe: FluxPipeline, paths: Sequence[Path]) -> None:
    """Reads every file once, before anything is compiled; raises `InvalidFile` or `LoraMismatch`."""
    shapes = weight_shapes(FluxArchitecture.from_diffusers_config(pipe.transformer.config))
    for path in paths:
        load_lora(path, shapes)


def add_lora(pipe: FluxPipeline, path: Path, name: str) -> None:
    """The pipeline's own call. Raises `LoraMismatch` where diffusers cannot read a file that fits."""
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    except (ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise LoraMismatch(
            f"diffusers cannot load {path.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            fix="Use a LoRA for FLUX.1, in diffusers' or kohya's format.",
            widget="lora",
        ) from error
