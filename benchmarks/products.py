"""`python -m benchmarks.products`: the matrix products of a step under load, by each kernel that cuBLASLt proposes.

A GPU at its power limit slows its clocks after some milliseconds, so a product by itself, measured for a moment, says
little of a step. Here all kernels of a product take turns without a pause, and its inputs are random numbers: zeros
take less power. One JSON line per product, and the sum of a step by the first proposal, by the best one and by PyTorch.
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
from trt_core.measure import median_milliseconds

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
PYTORCH, FIRST = "PyTorch", "cuBLASLt 0"
WORKSPACE_BYTES = 32 << 20
"""What PyTorch gives cuBLASLt on Hopper: room for sums of products that are split along K."""
TILE_ROWS, TILE_COLUMNS = 128, 256
"""Of the kernels that cuBLASLt takes for FLUX's large products on Hopper."""


@dataclass(frozen=True, slots=True)
class Product:
    """x [rows, width] @ weight [columns, width]^T + bias, `times` in a step. `onto`: added to `out`, without a bias."""

    name: str
    rows: int
    columns: int
    width: int
    times: int
    gelu: bool = False
    onto: bool = False
    fp8: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.width

    def cut_rows(self, multiprocessors: int) -> int | None:
        """Rows whose tiles fill all multiprocessors without a rest, where the last round has work for less than half of
        them; None where it has more, or where there is one round alone."""
        beside = -(-self.columns // TILE_COLUMNS)
        whole, rest = divmod(-(-self.rows // TILE_ROWS) * beside, multiprocessors)
        rows = whole * multiprocessors // beside * TILE_ROWS
        return rows if 0 < rest < multiprocessors / 2 and 0 < rows < self.rows else None


def step_products(arch: FluxArchitecture, call: Call) -> list[Product]:
    """As compiled blocks make them: bf16 cuts a single block's linear layers between attention and MLP."""
    hidden, mlp = arch.hidden, arch.mlp_hidden
    found = []
    for stream, tokens in (("img", call.img_tokens), ("txt", call.txt_tokens)):
        make = partial(Product, rows=call.batch * tokens, times=arch.double_depth, fp8=call.fp8)
        found += [
            make(f"{stream}_attn.qkv", columns=3 * hidden, width=hidden),
            make(f"{stream}_attn.proj", columns=hidden, width=hidden),
            make(f"{stream}_mlp.0", columns=mlp, width=hidden, gelu=not call.fp8),
            make(f"{stream}_mlp.2", columns=hidden, width=mlp),
        ]
    make = partial(Product, rows=call.rows, times=arch.single_depth, fp8=call.fp8)
    if call.fp8:
        return [*found, make("linear1", columns=3 * hidden + mlp, width=hidden),
                make("linear2", columns=hidden, width=hidden + mlp)]  # fmt: skip
    return [*found, make("linear1, qkv", columns=3 * hidden, width=hidden),
            make("linear1, mlp", columns=mlp, width=hidden, gelu=True),
            make("linear2, attention", columns=hidden, width=hidden),
            make("linear2, mlp", columns=hidden, width=mlp, onto=True)]  # fmt: skip


def large(arch: FluxArchitecture, precision: str) -> Product:
    """What the GPU does best, as a measure for the others: a large cube, which is no part of a step."""
    side = 8 * arch.hidden // 3
    return Product("a large cube", side, side, side, times=0, fp8=precision == "fp8")


# -- ways to compute one -----------------------------------------------------------------------------------------------


class Inputs:
    """Random tensors of one product; every way writes to `out`."""

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product = product
        self.x, self.weight = (_normal(n, product.width, device) for n in (product.rows, product.columns))
        self.weight *= product.width**-0.5
        self.bias = None if product.onto else _normal(1, product.columns, device)[0]
        self.out = _normal(product.rows, product.columns, device)
        if product.fp8:
            (self.x, self.x_scale), (self.weight, self.weight_scale) = map(fp8.quantize_rows, (self.x, self.weight))

    def by_pytorch(self) -> None:
        if self.product.fp8:
            torch._scaled_mm(self.x, self.weight.t(), scale_a=self.x_scale, scale_b=self.weight_scale.t(),
                             bias=self.bias, out_dtype=self.out.dtype, use_fast_accum=True, out=self.out)  # fmt: skip
        else:
            fused.product_by_pytorch(self.x, self.weight, self.bias, self.out, self.product.gelu)

    def by_cublaslt(self, proposal: cublaslt.Proposal = cublaslt.FIRST, rows: slice = slice(None)) -> bool:
        x, out = self.x[rows], self.out[rows]
        if self.product.fp8:
            scales = self.x_scale[rows], self.weight, self.weight_scale
            return cublaslt.multiply(x, *scales, self.bias, out, proposal=proposal)
        about = {"gelu": self.product.gelu, "onto": self.product.onto}
        return cublaslt.multiply_bf16(x, self.weight, self.bias, out, **about, proposal=proposal)

    def in_two(self, rows: int) -> None:
        self.by_cublaslt(rows=slice(0, rows))
        self.by_cublaslt(rows=slice(rows, None))


def ways(inputs: Inputs, proposals: int) -> dict[str, Callable[[], object]]:
    """Names of ways to compute the product, each with its call: PyTorch's alone where cuBLASLt cannot be called."""
    found: dict[str, Callable[[], object]] = {PYTORCH: inputs.by_pytorch}
    device = inputs.out.device
    if device.type != "cuda" or cublaslt.why_not(device.index):
        return found
    found |= _proposals(inputs, proposals, "cuBLASLt {}", None)
    room = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    found |= _proposals(inputs, proposals, "cuBLASLt {} with workspace", room)
    cut = inputs.product.cut_rows(torch.cuda.get_device_properties(device).multi_processor_count)
    if cut and FIRST in found:
        found[f"{cut} rows, then {inputs.product.rows - cut}"] = partial(inputs.in_two, cut)
    return found


def _proposals(inputs: Inputs, most: int, name: str, workspace: Tensor | None) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for place in range(most):
        proposal = cublaslt.Proposal(place, workspace)
        if not inputs.by_cublaslt(proposal):
            break
        found[name.format(place)] = partial(inputs.by_cublaslt, proposal)
    return found


def _normal(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)


# -- time --------------------------------------------------------------------------------------------------------------


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, turns: int, turn_ms: float
) -> dict[str, float]:
    """Milliseconds of one call of each, the median of `turns`; a turn repeats a call for about `turn_ms`."""
    runs = {name: _repeated(call, device, turn_ms) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            times[name].append(runs[name]())
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


def _repeated(call: Callable[[], object], device: torch.device, turn_ms: float) -> Callable[[], float]:
    """Runs `call` for about `turn_ms` and returns milliseconds of one, on a GPU from a CUDA graph: no gaps."""
    call()
    if device.type != "cuda":
        return partial(median_milliseconds, call, device, 1, 0)
    once = _on_gpu(call, 3) / 3
    count = max(1, round(turn_ms / once))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return lambda: _on_gpu(graph.replay, 1) / count


def _on_gpu(call: Callable[[], object], times: int) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(times):
        call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def kernel_names(call: Callable[..., object], *arguments: Tensor) -> list[str]:
    """Of what ran on the GPU in a second call; the profile names calls on the CPU, too."""
    call(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(*arguments)
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages() if event.self_device_time_total > 0]


# -- lines -------------------------------------------------------------------------------------------------------------


def measure(product: Product, device: torch.device, args: argparse.Namespace) -> Line:
    calls = ways(Inputs(product, device), args.proposals)
    found = in_turns(calls, device, args.turns, args.turn_ms)
    names = {name: kernel_names(call) for name, call in calls.items()} if device.type == "cuda" else {}
    return {**asdict(product), "ms": found, "kernels": names}


def shown(line: Line) -> str:
    ms, best = line["ms"], min(line["ms"], key=line["ms"].get)
    tflops = 2e-9 * line["rows"] * line["columns"] * line["width"] / ms[best]
    others = "  ".join(f"{name} {value / ms[PYTORCH]:.3f}" for name, value in ms.items() if name != PYTORCH)
    return f"{line['name']:20} {ms[PYTORCH]:.4f} ms; best {best}, {tflops:.0f} TFLOP/s; to PyTorch: {others}"


def step_sums(lines: Sequence[Line]) -> dict[str, float]:
    """Milliseconds of all products of a step."""

    def total(of: Callable[[Mapping[str, float]], float]) -> float:
        return sum(line["times"] * of(line["ms"]) for line in lines)

    return {PYTORCH: total(lambda ms: ms[PYTORCH]), FIRST: total(lambda ms: ms.get(FIRST, ms[PYTORCH])),
            "best": total(lambda ms: min(ms.values()))}  # fmt: skip


def measured(args: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    arch, (img, txt) = (TINY, (64, 16)) if args.tiny else (FULL, ((args.px // 16) ** 2, args.text_tokens))
    yield {"precision": args.precision, **measure(large(arch, args.precision), device, args)}
    for batch in args.batch:
        lines = []
        for product in step_products(arch, Call(batch, img, txt, args.precision == "fp8")):
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
    parser.add_argument("--proposals", type=int, default=8, help="kernels that are tried, without a workspace and with")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turn-ms", type=float, default=40.0, help="milliseconds of one kernel without a pause")
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
