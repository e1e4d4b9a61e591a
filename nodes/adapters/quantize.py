"""FP8 Quantize: a recipe left on a clone of the patcher, whose weights stay as they are.

TRT Compile Transformer downstream reads the recipe and binds FP8 weights made from the model's own ones, which remain
the base for LoRAs. Without it, an `OUTER_SAMPLE` wrapper lends the sampler a patcher of another model for the run: the
same one in ComfyUI's own FP8 format (`quantize_copy`). So other branches of the graph never meet a quantized weight,
and both kinds of ModelPatcher load the copy as they load an FP8 file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor

from ...trt_core.errors import InvalidOption, UnsupportedModel
from ...trt_core.fp8_recipe import Activations, Fp8Config, Fp8Recipe, excluded_linears, plan_recipe
from . import weights
from .host import NodeProgress, named, show
from .quantize_calibration import Calibration, calibrated
from .quantize_copy import Fp8Copy, copy_of
from .quantize_measure import Measured, measured

KEY = "trt_core.fp8"
_COMPILED = "trt_core"
"""Key of TRT Compile Transformer's wrappers."""
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Quantized:
    """What the node leaves on a patcher and on all its clones."""

    recipe: Fp8Recipe
    copy: Fp8Copy


def recipe_of(patcher: Any) -> Fp8Recipe | None:
    """The recipe that an FP8 Quantize node left on the patcher."""
    found = patcher.attachments.get(KEY)
    return None if found is None else found.recipe


def quantized(
    patcher: Any, config: Fp8Config, calibration: Calibration | None, node: str, node_id: str
) -> tuple[Any, Measured]:
    """A clone of the patcher with a recipe, and what quantizing costs and saves.

    With a calibration, static activations get their ranges, and either kind the mean inputs that correct biases.

    Raises `UnsupportedModel` or `InvalidOption`; a mistyped pattern is said before minutes of calibration.
    """
    weights.require_flux(patcher)
    _refuse_quantized(patcher)
    arch, progress = weights.architecture(weights.flux_of(patcher)), NodeProgress(node_id)
    excluded_linears(arch, config.exclude)
    static = config.activations is Activations.STATIC
    if static:
        _require_conditioning(calibration)
    seen = calibration and calibrated(patcher, calibration, progress)
    amax = seen.inputs.amax if seen and static else None
    recipe = plan_recipe(arch, config, amax, seen and seen.inputs.mean)
    found = measured(patcher, recipe, seen, progress)
    clone = patcher.clone()
    clone.set_attachments(KEY, Quantized(recipe, copy_of(patcher, recipe)))
    wrapper = OwnFormat(node, node_id, found)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper.outer_sample)
    return clone, found


class OwnFormat:
    """Runs the model in ComfyUI's own FP8 format, unless it is compiled."""

    def __init__(self, node: str, node_id: str, found: Measured) -> None:
        self._node, self._node_id, self._found = node, node_id, found

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """OUTER_SAMPLE: the guider samples with a patcher of the FP8 copy, and has its own back afterwards."""
        guider = executor.class_obj
        patcher = guider.model_patcher
        lines = self._found.lines()
        if patcher.wrappers.get(WrappersMP.PREPARE_SAMPLING, {}).get(_COMPILED):
            show(self._node_id, "\n".join([*lines, "TRT Compile Transformer runs it."]))
            return executor(*args, **kwargs)
        if reason := _why_full_precision(patcher):
            show(self._node_id, "\n".join([*lines, f"This run is not in FP8: {reason}."]))
            return executor(*args, **kwargs)
        with named(self._node):
            guider.model_patcher = patcher.attachments[KEY].copy.patcher_for(patcher, NodeProgress(self._node_id))
        show(self._node_id, "\n".join([*lines, self._how(patcher.load_device)]))
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_patcher = patcher

    def _how(self, device: torch.device) -> str:
        per_layer = f"ComfyUI's own FP8 runs it, with one scale per layer ({self._found.own_words})"
        if comfy.model_management.supports_fp8_compute(device):
            return f"{per_layer}."
        return f"{per_layer}. This device multiplies no FP8: it saves memory, not time."


def _why_full_precision(patcher: Any) -> str:
    if KEY not in patcher.attachments:
        return "another node took the recipe off the model"
    if patcher.hook_patches or patcher.forced_hooks is not None:
        return "the conditioning has LoRA hooks, which ComfyUI cannot apply to FP8 weights"
    if patcher.get_additional_models_with_key("multigpu"):
        return "the model is spread over several GPUs"
    return ""


def _refuse_quantized(patcher: Any) -> None:
    """Raises for a model whose weights were rounded before: FP8 starts from full precision."""
    if recipe_of(patcher) is not None:
        raise InvalidOption(
            "The model comes from another FP8 Quantize node.", expected="One of them decides about all layers.",
            fix="Take one of the two nodes out.", widget="model",
        )  # fmt: skip
    for name, key in weights.block_weights(weights.flux_of(patcher)).items():
        weight = weights.raw_base(patcher, key)
        dtype = weights.stored_dtype(patcher, key) or weight.dtype
        if isinstance(weight, QuantizedTensor) or dtype not in _PLAIN:
            kind = weight._layout_cls if isinstance(weight, QuantizedTensor) else str(dtype).removeprefix("torch.")
            raise UnsupportedModel(
                f"This model is quantized already: {name} is {kind}.",
                expected="FP8 starts from bf16, fp16 or fp32 weights: what was rounded once cannot take LoRAs exactly.",
                fix='Load the bf16 file with weight_dtype "default", or take this node out: TRT Compile Transformer '
                "and ComfyUI use an FP8 file as it is.",
                widget="model",
            )  # fmt: skip


def _require_conditioning(calibration: Calibration | None) -> None:
    if calibration is None:
        raise InvalidOption(
            "Static activations need calibration, and no conditioning is connected.",
            fix='Connect the prompt\'s CONDITIONING to "conditioning", or choose dynamic activations, which need none.',
            widget="conditioning",
        )
