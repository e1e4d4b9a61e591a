"""`python -m benchmarks.kernel_search`: which of cuBLASLt's kernels are worth a plan's while on this GPU.

For each product of a step, at clocks that have settled: all tiles with the options that suit them, then the best tiles
with all clusters, then the best of those with all options. What is found goes into `kernel_ranking.CANDIDATES`, from
which a plan chooses on its own GPU. One JSON line per product.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch

from trt_core.flux import cublaslt
from trt_core.flux.cublaslt_kernels import CLUSTERS, OPTIONS, OWN, TILES, Kernel
from trt_core.flux.products import Product
from trt_core.kernel_ranking import ProductInputs
from trt_core.measure import settled_milliseconds

from .fp8_lines import append
from .kernels import Call
from .lines import RESULTS, Line
from .products import FULL, step_products
from .run import machine

_TOGETHER = 6
"""Kernels between two measurements of cuBLASLt's own choice, as a GPU's clocks drift while it warms up."""
_HOPELESS = 1.1
_BEST_TILES, _BEST_CLUSTERS, _SHOWN = 4, 3, 8

Measure = Callable[[Sequence[Kernel]], dict[Kernel, float]]
"""Kernels to their times in units of cuBLASLt's choice, without those that cannot or that are hopeless."""


def first_kernels() -> list[Kernel]:
    """All tiles, operands either way, by two groups of warps with a tile each and with one together."""
    return [Kernel(tile, "2x1" if option & 1 else "1x2", option) for tile in TILES for option in (1, 2, 5, 6)]


def search(measure: Measure, more: Callable[[], bool]) -> dict[Kernel, float]:
    """Times of what was tried, in units of cuBLASLt's choice, until `more` says that there is no time left."""
    found: dict[Kernel, float] = {}
    tried: set[Kernel] = set()

    def measure_all(kernels: Iterable[Kernel]) -> None:
        waiting = iter([kernel for kernel in dict.fromkeys(kernels) if kernel not in tried])
        while (some := list(islice(waiting, _TOGETHER))) and more():
            tried.update(some)
            found.update(measure(some))

    measure_all(first_kernels())
    measure_all(replace(k, cluster=cluster) for k in best(found, _BEST_TILES) for cluster in CLUSTERS)
    measure_all(replace(k, option=option) for k in best(found, _BEST_CLUSTERS) for option in OPTIONS)
    return found


def best(found: dict[Kernel, float], count: int) -> list[Kernel]:
    return sorted(found, key=found.__getitem__)[:count]


def measured_by(inputs: ProductInputs, args: argparse.Namespace) -> Measure:
    def measure(kernels: Sequence[Kernel]) -> dict[Kernel, float]:
        calls = inputs.calls((OWN, *kernels))
        times = settled_milliseconds(calls, inputs.out.device, args.settle_ms, args.taken_ms, _HOPELESS)
        return {kernel: ms / times[OWN] for kernel, ms in times.items() if kernel != OWN}

    return measure


def searched(name: str, product: Product, args: argparse.Namespace) -> Line:
    """The best kernels, once more, together and for longer."""
    inputs, ends = ProductInputs(product, torch.device("cuda", 0)), time.monotonic() + args.seconds
    found = search(measured_by(inputs, args), lambda: time.monotonic() < ends)
    calls = inputs.calls((OWN, *best(found, _SHOWN)))
    times = settled_milliseconds(calls, inputs.out.device, 2 * args.settle_ms, 3 * args.taken_ms)
    return {"name": name, **asdict(product), "measured": len(found),
            "ms": {kernel.words(): ms for kernel, ms in sorted(times.items(), key=lambda pair: pair[1])}}  # fmt: skip


def shown(line: Line) -> str:
    own = line["ms"][OWN.words()]
    words = "; ".join(f"{name} {ms / own:.3f}" for name, ms in line["ms"].items())
    return f"{line['name']:20} {own:.4f} ms, {line['measured']} measured: {words}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--products", nargs="+", help="names as benchmarks.products shows them; default: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each product")
    parser.add_argument("--settle-ms", type=float, default=80.0)
    parser.add_argument("--taken-ms", type=float, default=100.0)
    parser.add_argument("--run", default=time.strftime("%Y%m%d-%H%M%S"), help="name that ties the lines of one run")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels")
    args = parser.parse_args(argv)
    reason = cublaslt.why_not(0) if torch.cuda.is_available() else "no NVIDIA GPU"
    if reason:
        parser.exit(1, f"Nothing to search here: {reason}.\n")
    for made in step_products(FULL, Call(args.batch, 4096, 512, args.precision == "fp8")):
        if args.products is None or made.name in args.products:
            line = {"run": args.run, "precision": args.precision, **searched(made.name, made.product, args)}
            sys.stdout.write(shown(line) + "\n")
            sys.stdout.flush()
            append(args.results, [line], machine())


if __name__ == "__main__":
    main()
