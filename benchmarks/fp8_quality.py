"""`python -m benchmarks.fp8_quality`: how far FP8 is from fp32, over one call, 20 steps and LoRAs; one JSON line each.

Random weights with residual branches at a gain of 0.05: at 0.2, bf16 alone is off by 4 % on adversarial weights, while
a trained model's bf16 is off by about 1 %, so that all that rounds would look as bad as nothing real does.

GPU memory held: the model in bf16 (24 GB), which fp32 reads too, its FP8 copy (12 GB), and a second FP8 copy while
LoRAs are switched. Bases stay on the GPU: in host memory every change of weights would go through the CPU. The lines
that say most come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import model as models
from .fake_quant import FakeAttention, fake_quantized
from .fp8_calls import attention_is_fp8, call, cosine, exact, same_bits
from .fp8_euler import ExactWay, euler_line, other_calls
from .fp8_lines import TINY, TINY_PX, TINY_TEXT_TOKENS, Line, device_of, parser, write
from .fp8_loras import lora_gain_lines, lora_names, lora_switch_line
from .process import relative
from .progress import Progress
from .wide import widened

BRANCH_GAIN = 0.05


# -- one call ----------------------------------------------------------------------------------------------------------


def reference(model: Any, wide: Any, arguments: dict[str, Tensor], adversarial: bool) -> tuple[Line, Tensor]:
    """Fills the model, whose weights `wide` reads. Errors of eager PyTorch and of the simulation, and fp32's output."""
    models.fill(model, adversarial, BRANCH_GAIN)
    truth, line = call(wide, exact(arguments)), {}
    seen = {"eager": call(model, arguments)}
    with fake_quantized(model):
        seen["simulated"] = call(model, arguments)
        with FakeAttention():
            seen["simulated_attention"] = call(model, arguments)
    with fake_quantized(wide):
        seen["simulated_fp32"] = call(wide, exact(arguments))
    for name, output in seen.items():
        line |= {f"{name}_error": relative(output, truth), f"{name}_cosine": cosine(output, truth)}
    return line, truth


def forward_line(kind: str, seen: Tensor, line: Line, truth: Tensor, fp8_attention: bool) -> Line:
    """`ratio_to_recipe`: to the simulation that rounds what this model rounds."""
    error = relative(seen, truth)
    names = ("simulated", "simulated_attention", "simulated_fp32")
    ratios = {f"ratio_to_{name}": error / line[f"{name}_error"] for name in names}
    ratios["ratio_to_recipe"] = ratios["ratio_to_simulated_attention" if fp8_attention else "ratio_to_simulated"]
    about = {"kind": "forward", "weights": kind, "fp8_attention": fp8_attention}
    return {**about, "error": error, "cosine": cosine(seen, truth), **ratios, **line}


def refill(model: Any, adversarial: bool) -> None:
    """An FP8 model reads new weights when it is bound again, which any change of its place brings about."""
    model.to(model.dtype)
    models.fill(model, adversarial, BRANCH_GAIN)


# -- the run -----------------------------------------------------------------------------------------------------------


def measure(
    device: torch.device, px: int, text_tokens: int, options: dict[str, Any], changes: dict[str, Any]
) -> Iterator[Line]:
    """All lines. `options` go to `compile_transformer`, `changes` to the model's config."""
    import trt_core

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    progress = Progress("fp8_quality")
    with progress.phase("references"):
        model = models.full_size_transformer(device, BRANCH_GAIN, **changes)
        wide, arguments = widened(model), models.inputs(model, 1, px, px, text_tokens)
        known = {kind: reference(model, wide, arguments, kind == "adversarial") for kind in ("adversarial", "plain")}
    trt_core.quantize_fp8_(model)
    ours: Any = trt_core.compile_transformer(model, base_weights="gpu", **options)
    with progress.phase("first call"):
        plain = call(ours, arguments)
    yield {
        **forward_line("plain", plain, *known["plain"], attention_is_fp8(ours)),
        "segments": ours.trt_report().segments,
    }
    with progress.phase("adversarial weights"):
        refill(ours, adversarial=True)
        seen = call(ours, arguments)
        yield forward_line("adversarial", seen, *known["adversarial"], attention_is_fp8(ours))
    refill(ours, adversarial=False)
    if not same_bits(call(ours, arguments), plain):
        raise SystemExit("The same weights, bound again, gave another output.")
    yield from lora_gain_lines(ours, wide, arguments)
    with progress.phase("LoRA switches"):
        yield lora_switch_line(ours, arguments)
    ours.delete_adapters(lora_names())
    with progress.phase("20 steps"):
        way = ExactWay.of(wide, arguments)
        yield euler_line(ours, way, simulate=True)
    with progress.phase("20 steps, biases corrected"):
        ours = corrected(ours, arguments, options)
        yield {**euler_line(ours, way), "corrected": True}


def corrected(ours: Any, arguments: dict[str, Tensor], options: dict[str, Any]) -> Any:
    """The model anew, calibrated on calls that are not among the measured ones."""
    import trt_core

    trt_core.dequantize_(ours)
    trt_core.quantize_fp8_(ours, calibration=other_calls(arguments))
    return trt_core.compile_transformer(ours, base_weights="gpu", **options)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--px", type=int, default=512, help="side of the picture")
    args = arguments.parse_args()
    device, options = device_of(args.tiny), {"backend": args.backend, "cache_folder": args.cache}
    px, text_tokens, changes = (TINY_PX, TINY_TEXT_TOKENS, TINY) if args.tiny else (args.px, 512, {})
    lines = measure(device, px, text_tokens, options, changes)
    write(args, ({**line, "height_px": px, "width_px": px, "text_tokens": text_tokens} for line in lines))


if __name__ == "__main__":
    main()
