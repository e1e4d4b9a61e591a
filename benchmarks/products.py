"""`python -m benchmarks.products`: the matrix products of a step, by each of cuBLASLt's kernels that a plan may take.

Each runs alone until the GPU's clocks have settled: at its power limit, where a step is, too, that compares energy. Its
inputs are random numbers: zeros take less. One JSON line per product, and the sum of a step by PyTorch, by cuBLASLt's
choice and by the best kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trt_core.flux import cublaslt, fp8, fused
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.block_products import block_products
from trt_core.flux.catalogue import BlockKind
from trt_core.flux.cublaslt_kernels import OWN
from trt_core.flux.products import Product
from trt_core.kernel_ranking import ProductInputs, candidates
from trt_core.measure import settled_milliseconds

from .fp8_lines import append, device_of
from .kernels import Call
from .lines import RESULTS, Line
from .run import machine

FULL = FluxArchitecture(
    in_channels=64, out_channels=64, hidden=3072, heads=24, mlp_hidden=12288, double_depth=19, single_depth=38,
    context_dim=4096, vec_dim=768, guidance=True, axes_dim=(16, 56, 56),
)  # fmt: skip
TINY = FluxArchitecture(
    in_channels=64, out_channels=64, hidden=256, heads=2, mlp_hidden=1024, double_depth=2, single_depth=2,
    context_dim=64, vec_dim=32, guidance=True, axes_dim=(16, 56, 56),
)  # fmt: skip
PYTORCH, BY_CUBLASLT = "PyTorch", OWN.words()


@dataclass(frozen=True, slots=True)
class StepProduct:
    """A product and how often a step makes it."""

    name: str
    product: Product
    times: int


def step_products(arch: FluxArchitecture, call: Call, joined: bool = True) -> list[StepProduct]:
    """As compiled blocks make them; `joined` as `block_products` has it."""
    times = {BlockKind.DOUBLE: arch.double_depth, BlockKind.SINGLE: arch.single_depth}
    sizes = (call.batch, call.img_tokens, call.txt_tokens, call.fp8, joined)
    return [
        StepProduct(name, product, times[kind])
        for kind in BlockKind
        for name, product in block_products(kind, arch, *sizes).items()
    ]


def large(arch: FluxArchitecture, precision: str) -> StepProduct:
    """What the GPU does best, as a measure for the others: a large cube, which is no part of a step."""
    side = 8 * arch.hidden // 3
    return StepProduct("a large cube", Product(side, side, side, fp8=precision == "fp8"), 0)


def by_pytorch(inputs: ProductInputs) -> None:
    if inputs.product.fp8:
        scales = inputs.x_scale, inputs.weight, inputs.weight_scale
        fp8.product_by_pytorch(inputs.x, *scales, inputs.bias, inputs.out)
    else:
        fused.product_by_pytorch(inputs.x, inputs.weight, inputs.bias, inputs.out, inputs.product.gelu)


def ways(inputs: ProductInputs) -> dict[str, Callable[[], object]]:
    """Names of ways to compute the product, each with its call: PyTorch's alone where cuBLASLt cannot be called."""
    found: dict[str, Callable[[], object]] = {PYTORCH: partial(by_pytorch, inputs)}
    device = inputs.out.device
    if device.type != "cuda" or cublaslt.why_not(device.index):
        return found
    calls = inputs.calls((OWN, *candidates(inputs.product)))
    return found | {kernel.words(): call for kernel, call in calls.items()}


def kernel_names(call: Callable[..., object], *arguments: Tensor) -> list[str]:
    """Of what ran on the GPU in a second call; the profile names calls on the CPU, too."""
    call(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(*arguments)
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages() if event.self_device_time_total > 0]


# -- lines -------------------------------------------------------------------------------------------------------------


def measure(step_product: StepProduct, device: torch.device, args: argparse.Namespace) -> Line:
    calls = ways(ProductInputs(step_product.product, device))
    found = settled_milliseconds(calls, device, args.settle_ms, args.taken_ms)
    names = {name: kernel_names(call) for name, call in calls.items()} if device.type == "cuda" else {}
    about = {"name": step_product.name, "times": step_product.times, **asdict(step_product.product)}
    return {**about, "ms": found, "kernels": names}


def shown(line: Line) -> str:
    ms, best = line["ms"], min(line["ms"], key=line["ms"].get)
    tflops = 2e-9 * line["rows"] * line["columns"] * line["width"] / ms[best]
    others = "  ".join(f"{name} {value / ms[PYTORCH]:.3f}" for name, value in ms.items() if name != PYTORCH)
    return f"{line['name']:20} {ms[PYTORCH]:.4f} ms; best {best}, {tflops:.0f} TFLOP/s; to PyTorch: {others}"


def step_sums(lines: Sequence[Line]) -> dict[str, float]:
    """Milliseconds of all products of a step."""

    def total(of: Callable[[Mapping[str, float]], float]) -> float:
        return sum(line["times"] * of(line["ms"]) for line in lines)

    return {PYTORCH: total(lambda ms: ms[PYTORCH]), BY_CUBLASLT: total(lambda ms: ms.get(BY_CUBLASLT, ms[PYTORCH])),
            "best": total(lambda ms: min(ms.values()))}  # fmt: skip


def measured(args: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    arch, (img, txt) = (TINY, (64, 16)) if args.tiny else (FULL, ((args.px // 16) ** 2, args.text_tokens))
    yield {"precision": args.precision, **measure(large(arch, args.precision), device, args)}
    for batch in args.batch:
        lines = []
        for product in step_products(arch, Call(batch, img, txt, args.precision == "fp8"), not args.cut):
            line = {"precision": args.precision, "batch": batch, **measure(product, device, args)}
            lines.append(line)
            yield line
        sums = "  ".join(f"{name} {ms:.2f} ms" for name, ms in step_sums(lines).items())
        sys.stdout.write(f"all products of a step, {args.precision}, batch {batch}: {sums}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--px", type=int, default=1024, help="side of the picture")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--cut", action="store_true", help="bf16 as with another attention than FlashAttention-3")
    parser.add_argument("--settle-ms", type=float, default=150.0, help="before a kernel is timed")
    parser.add_argument("--taken-ms", type=float, default=150.0, help="that count")
    parser.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/products; with --tiny, none")
    parser.add_argument(
        "--tiny", action="store_true", help="small products on whatever device there is, as a self-test"
    )
    args = parser.parse_args(argv)
    device, about = device_of(args.tiny), machine()
    folder = args.results or (None if args.tiny else RESULTS / "products")
    for line in measured(args, device):
        line = {"run": args.run, **line}
        sys.stdout.write((json.dumps(line) if args.tiny else shown(line)) + "\n")
        sys.stdout.flush()
        if folder is not None:
            append(folder, [line], about)


if __name__ == "__main__":
    main()
