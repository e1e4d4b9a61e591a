"""What the kernels of one step are for, told by their names, and the least time that each kind of work can take.

The floor is arithmetic at the GPU's peak, or bytes at its bandwidth where every row is read and written once. It holds
for work cut like this: what is fused into a product's own kernel costs less. Scales, biases and vectors that all rows
share are less than 1 % of the bytes and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.weights import weight_shapes

# -- classes -----------------------------------------------------------------------------------------------------------


class Kind(Enum):
    GEMM = "GEMM"
    ATTENTION = "attention"
    NORM = "norm + modulation"
    GELU = "GELU, join"
    QK = "q/k norm + RoPE"
    GATE = "gate + residual"
    QUANTIZE = "quantization"
    MODULATION = "modulation products"
    COPY = "copies, memsets"
    OTHER = "other"


_INDUCTOR = r"^triton_(poi|red|per)_fused_"
_PATTERNS = (
    # Inductor's kernels are named after every operation they come from, also after a product that reads their result:
    # they are told apart before anything else is looked for.
    (r"^triton_tem_", Kind.GEMM),
    (_INDUCTOR + r".*layer_norm", Kind.NORM),
    (_INDUCTOR + r".*gelu", Kind.GELU),
    (_INDUCTOR + r".*(rms_norm|rsqrt)", Kind.QK),
    (_INDUCTOR + r".*(amax|float8)", Kind.QUANTIZE),
    (_INDUCTOR + r"(?=.*add_)(?=.*mul_)", Kind.GATE),  # "add_" is no "addmm_"
    (_INDUCTOR + r".*(_cat_|cat_|clone|copy|expand|pad|full|zeros)", Kind.COPY),
    (_INDUCTOR, Kind.OTHER),
    # Before the products, which share names with them: fmha_cutlassF, _gemm_mha_v2.
    (r"sdpa|fmha|_mha_|flash|attention|attn_fwd|attn_kernel", Kind.ATTENTION),
    # Our Triton kernels. One that also quantizes is counted as what it computes: the row is in registers anyway.
    (r"rope|_queries_keys_", Kind.QK),
    (r"^(?!.*(nvjet|gemm)).*gelu", Kind.GELU),  # cuBLAS names a product's epilogue: nvjet_..._gelubias_TNT
    (r"rms_?norm", Kind.QK),  # PyTorch's own, in eager blocks: nothing else in FLUX has an RMS norm
    (r"layer_?norm|modulated_norm|_norm_kernel", Kind.NORM),
    (r"_gate_|_residual_", Kind.GATE),
    (r"_quantize_|_bound_kernel", Kind.QUANTIZE),
    (r"weight_only|row_sums|_modulations?_kernel|_(following|compare|choose|remember)_kernel", Kind.MODULATION),
    # One row per picture: modulations and embeddings alone. cuBLAS names its tiles: 8 or 16 columns are no 256 tokens.
    (r"gemv|gemmk1|dot_kernel", Kind.MODULATION),
    (r"nvjet_(sm\d+_)?[a-z]+_\d+x(8|16)_", Kind.MODULATION),
    # cuBLAS (nvjet, xmma, s16816), CUTLASS under `_scaled_mm`, TensorRT; the CPU's operators.
    (r"nvjet|gemm|xmma|s16816|scaled_mm|aten::(addmm|mm|bmm|linear|baddbmm)$", Kind.GEMM),
    (r"memcpy|memset|copy_kernel|CatArray|FillFunctor|aten::(copy_|cat|clone|contiguous|fill_|zero_)$", Kind.COPY),
)
"""(pattern, what such a kernel is for), the first that is found anywhere in the name, whatever its case."""
_SPLIT_K = "splitkreduce"
"""The second half of a product that was split along K: it belongs to the product before it, whose size it may have."""


def kind_of(name: str, before: Kind = Kind.OTHER) -> Kind:
    """What the kernel `name` is for; `before` is the kind of the kernel that ran before it."""
    if _SPLIT_K in name.lower():
        return before
    return next((kind for pattern, kind in _PATTERNS if re.search(pattern, name, re.IGNORECASE)), Kind.OTHER)


@dataclass(slots=True)
class Total:
    ms: float = 0.0
    launches: int = 0


def totals(kernels: Iterable[tuple[str, float]]) -> tuple[dict[Kind, Total], dict[str, float]]:
    """Time and launches of each kind that there is, and the time of each kernel in `OTHER` by name.

    `kernels`: (name, milliseconds) in the order in which they ran.
    """
    found: dict[Kind, Total] = {}
    others: dict[str, float] = {}
    kind = Kind.OTHER
    for name, ms in kernels:
        kind = kind_of(name, kind)
        total = found.setdefault(kind, Total())
        total.ms, total.launches = total.ms + ms, total.launches + 1
        if kind is Kind.OTHER:
            others[name] = others.get(name, 0.0) + ms
    return found, others


# -- floors ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a GPU can do at most: dense TFLOP/s with fp32 sums, and memory bandwidth in TB/s."""

    bf16_tflops: float
    fp8_tflops: float
    tb_per_second: float


PEAKS = {
    "NVIDIA H200": Peaks(989.0, 1979.0, 4.8),
    "NVIDIA H100 80GB HBM3": Peaks(989.0, 1979.0, 3.35),
}
"""By PyTorch's name of the GPU. NVIDIA's data sheets, whose numbers with sparsity are twice these."""


@dataclass(frozen=True, slots=True)
class Call:
    """One step's sizes; `fp8`: all linear layers of all blocks are E4M3, as `quantize_fp8_` makes them by default."""

    batch: int
    img_tokens: int
    txt_tokens: int
    fp8: bool = False

    @property
    def rows(self) -> int:
        return self.batch * (self.img_tokens + self.txt_tokens)


@dataclass(frozen=True, slots=True)
class Work:
    bf16_flops: float = 0.0
    fp8_flops: float = 0.0
    bytes: float = 0.0

    def ms(self, peaks: Peaks) -> float:
        """The least time for it: none of it overlaps."""
        seconds = self.bf16_flops / peaks.bf16_tflops + self.fp8_flops / peaks.fp8_tflops
        return (seconds + self.bytes / peaks.tb_per_second) * 1e-12 * 1e3


def work(arch: FluxArchitecture, call: Call) -> dict[Kind, Work]:
    """What one step needs of each kind. Nothing has to be copied, so copies have no work."""
    blocks = arch.double_depth + arch.single_depth
    flops = attention_flops(arch, call) * blocks
    return {
        Kind.GEMM: gemm_work(arch, call),
        Kind.ATTENTION: Work(bf16_flops=flops),
        Kind.MODULATION: Work(bytes=modulation_bytes(arch, call)),
        Kind.COPY: Work(),
        **{kind: Work(bytes=number) for kind, number in element_bytes(arch, call).items()},
    }


def floors(arch: FluxArchitecture, call: Call, gpu: str) -> dict[Kind, float]:
    """Milliseconds of each kind at this GPU's peak; empty for a GPU whose peaks are not known here."""
    peaks = PEAKS.get(gpu)
    return {kind: some.ms(peaks) for kind, some in work(arch, call).items()} if peaks else {}


def attention_flops(arch: FluxArchitecture, call: Call) -> float:
    """Of one block: two products of all tokens with all tokens, a multiplication and an addition each."""
    tokens = call.img_tokens + call.txt_tokens
    return 4.0 * call.batch * tokens * tokens * arch.hidden


def gemm_work(arch: FluxArchitecture, call: Call) -> Work:
    """The products of tokens with matrices; those of blocks are FP8 if the call is."""
    flops = {True: 0.0, False: 0.0}
    for name, shape in weight_shapes(arch).items():
        tokens = _tokens(name, call)
        if len(shape) == 2 and tokens is not None:
            flops[_is_fp8(name, call)] += 2.0 * call.batch * tokens * shape[0] * shape[1]
    return Work(bf16_flops=flops[False], fp8_flops=flops[True])


def modulation_bytes(arch: FluxArchitecture, call: Call) -> float:
    """The matrices that see one row per picture, read once: for so few rows reading is all that counts."""
    return float(
        sum(
            shape[0] * shape[1] * (1 if _is_fp8(name, call) else 2)
            for name, shape in weight_shapes(arch).items()
            if len(shape) == 2 and _tokens(name, call) is None
        )
    )


def element_bytes(arch: FluxArchitecture, call: Call) -> Mapping[Kind, float]:
    """Bytes read and written between products: activations are bf16, what an FP8 product reads is one byte."""
    hidden, mlp, rows = arch.hidden, arch.mlp_hidden, call.rows
    double, single = arch.double_depth, arch.single_depth
    wide, product = 2, 1 if call.fp8 else 2
    final = call.batch * call.img_tokens * hidden * 2 * wide
    angles = (call.img_tokens + call.txt_tokens) * arch.head_dim * 4  # cos and sin, fp32, half a head each
    return {
        # A norm adds up the sum before it in the same kernel: of both, one pass.
        Kind.NORM: (2 * double + single) * rows * hidden * (3 * wide + product) + final,
        Kind.GELU: (double * mlp + single * (hidden + mlp)) * rows * (wide + product),
        Kind.QK: (double + single) * (rows * hidden * 4 * wide + angles),
        Kind.GATE: 0,
        Kind.QUANTIZE: double * rows * hidden * (wide + product) if call.fp8 else 0,
    }


def _is_fp8(name: str, call: Call) -> bool:
    return call.fp8 and name.startswith(("double_blocks.", "single_blocks."))


def _tokens(name: str, call: Call) -> int | None:
    """How many rows of one picture this matrix is multiplied with; None for one, as modulations and embeddings have."""
    if re.search(r"mod\.lin|modulation|^(time|vector|guidance)_in", name):
        return None
    if name.startswith("single_blocks."):
        return call.img_tokens + call.txt_tokens
    return call.txt_tokens if "txt_" in name else call.img_tokens
