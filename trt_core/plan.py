"""The plan of execution: which backend runs which segment, chosen from measurements. Pure: nothing is built here."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .config import Attention, Backend, Layout, Profile, ShapeRange
from .errors import BuildFailed
from .flux.catalogue import SPLIT_SEGMENTS, BlockKind, SegmentName
from .flux.cublaslt_kernels import Kernel
from .flux.products import Product

WHOLE_SEGMENT: Mapping[BlockKind, SegmentName] = {
    BlockKind.DOUBLE: SegmentName.DOUBLE_BLOCK,
    BlockKind.SINGLE: SegmentName.SINGLE_BLOCK,
}


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """How every block of one kind runs: its segments and their backends, and attention's kernel.

    `attention` lies between the segments of a split block and inside a whole one; TensorRT has its own inside. `wide`:
    FP8 weights are widened and products are in the model's dtype, but in TensorRT's segments.
    """

    kind: BlockKind
    layout: Layout
    backends: tuple[Backend, ...]
    attention: Attention
    wide: bool = False

    def __post_init__(self) -> None:
        if len(self.backends) != len(self.segments):
            raise ValueError(f"a {self.layout.value} block has {len(self.segments)} segments, not {len(self.backends)}")

    @property
    def segments(self) -> tuple[SegmentName, ...]:
        return SPLIT_SEGMENTS[self.kind] if self.layout is Layout.SPLIT else (WHOLE_SEGMENT[self.kind],)

    def words(self) -> str:
        """ "split tensorrt + inductor, cudnn attention", for log and node."""
        inside = (
            "TensorRT" if self.layout is Layout.WHOLE and Backend.TENSORRT in self.backends else self.attention.value
        )
        products = ", products not in fp8" if self.wide else ""
        return f"{self.layout.value} {' + '.join(b.value for b in self.backends)}, {inside} attention{products}"


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The attention kernel between segments, what it takes, and the one inside Inductor's whole blocks of each kind
    where that is another: E4M3 belongs inside, where q, k and v are rounded as they are made."""

    between: Attention
    between_ms: float
    inside: Mapping[BlockKind, Attention] = field(default_factory=dict)

    def of(self, name: SegmentName, backend: Backend) -> Attention:
        """The kernel for this segment's block."""
        whole = name is WHOLE_SEGMENT[name.kind] and backend is Backend.INDUCTOR
        return self.inside.get(name.kind, self.between) if whole else self.between

    def without(self, kind: BlockKind) -> AttentionChoice:
        """The same with the kernel between segments inside blocks of this kind, too."""
        return replace(self, inside={k: kernel for k, kernel in self.inside.items() if k is not kind})


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate segment (or attention kernel): its time, its error against eager, or why it was left out."""

    what: str
    backend: str
    milliseconds: float | None = None
    error_ratio: float | None = None
    left_out: str | None = None


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A product of matrices that takes another of cuBLASLt's kernels than cuBLASLt would."""

    product: Product
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice for both kinds of block, the profile it holds for, the kernels of products, and what all of it was
    chosen from."""

    double: BlockChoice
    single: BlockChoice
    profile: Profile
    measurements: tuple[Measurement, ...] = ()
    kernels: tuple[KernelChoice, ...] = ()

    def choice(self, kind: BlockKind) -> BlockChoice:
        return self.double if kind is BlockKind.DOUBLE else self.single

    def needed(self) -> list[tuple[SegmentName, Backend, Attention]]:
        return [
            (name, backend, choice.attention)
            for choice in (self.double, self.single)
            for name, backend in zip(choice.segments, choice.backends, strict=True)
        ]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), default=lambda member: member.value, indent=1).encode()

    @property
    def uses_profile(self) -> bool:
        """Whether shapes outside the profile need a rebuild: only TensorRT's engines are bound to it."""
        return Backend.TENSORRT in (*self.double.backends, *self.single.backends)

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        """Raises `ValueError`, `KeyError` or `TypeError` for anything that is no plan of this version."""
        fields = json.loads(data)
        return cls(
            double=_choice(fields["double"]),
            single=_choice(fields["single"]),
            profile=Profile(**{axis: ShapeRange(**bounds) for axis, bounds in dict(fields["profile"]).items()}),
            measurements=tuple(Measurement(**m) for m in fields["measurements"]),
            kernels=tuple(KernelChoice(Product(**k["product"]), Kernel(**k["kernel"])) for k in fields["kernels"]),
        )


def _choice(fields: Mapping[str, Any]) -> BlockChoice:
    return BlockChoice(
        BlockKind(fields["kind"]),
        Layout(fields["layout"]),
        tuple(Backend(b) for b in fields["backends"]),
        Attention(fields["attention"]),
        bool(fields["wide"]),
    )


def choose(
    kind: BlockKind,
    measured: Mapping[tuple[SegmentName, Backend], float],
    attention: AttentionChoice,
    wide: Collection[BlockKind] = (),
) -> tuple[BlockChoice, float]:
    """The fastest way to run a block and its milliseconds, from what was measured for each segment and backend.

    A split block takes the fastest backend for each half, plus attention between them. `wide`: kinds of blocks that
    were measured with products in the model's dtype.
    """
    options: list[tuple[float, BlockChoice]] = []
    whole = WHOLE_SEGMENT[kind]
    for (name, backend), ms in measured.items():
        if name is whole:
            options.append((ms, BlockChoice(kind, Layout.WHOLE, (backend,), attention.of(name, backend))))
    halves = [_fastest(name, measured) for name in SPLIT_SEGMENTS[kind]]
    if all(halves):
        total = attention.between_ms + sum(ms for ms, _ in halves if ms is not None)
        options.append((total, BlockChoice(kind, Layout.SPLIT, tuple(b for _, b in halves), attention.between)))
    if not options:
        raise BuildFailed(f"No candidate for the {kind.value} block could be measured.", fix='Use backend="eager".')
    ms, best = min(options, key=lambda option: option[0])
    return replace(best, wide=kind in wide and set(best.backends) != {Backend.TENSORRT}), ms


def _fastest(
    name: SegmentName, measured: Mapping[tuple[SegmentName, Backend], float]
) -> tuple[float, Backend] | tuple[()]:
    found = [(ms, backend) for (segment, backend), ms in measured.items() if segment is name]
    return min(found, key=lambda pair: pair[0]) if found else ()


def why_not_whole_tensorrt(
    kind: BlockKind,
    measured: Mapping[tuple[SegmentName, Backend], float],
    best_ms: float,
    hopeless: Collection[SegmentName] = (),
) -> str | None:
    """The reason why a whole TensorRT block need not be built, or None.

    It does the same work as TensorRT's two halves plus attention. Where the halves alone are already slower than the
    best block measured, it cannot win, and building it would cost the artist 20 s. Nor can it where its second half is
    one of the `hopeless` ones: with attention that is no faster than what was measured between segments, those beat no
    block even beside the fastest first half (`why_not_second_half`).
    """
    second = SPLIT_SEGMENTS[kind][1]
    if second in hopeless:
        return f"it does the work of {second.value}, too, which is left out"
    halves = [measured.get((name, Backend.TENSORRT)) for name in SPLIT_SEGMENTS[kind]]
    known = [ms for ms in halves if ms is not None]
    if len(known) < len(halves) or sum(known) <= best_ms:
        return None
    return f"its halves take {sum(known):.2f} ms without attention, the best whole block {best_ms:.2f} ms"


_SECOND_TO_FIRST = 3 / 4
"""The least that TensorRT's second half takes of its products' time, to what its first half takes of its own."""


def why_not_second_half(
    first_ms: float, first_products_ms: float, products_ms: float, best_ms: float, attention_ms: float
) -> str | None:
    """The reason why TensorRT's second half of a block need not be built, or None.

    `first_ms` is what TensorRT's first half takes, `first_products_ms` and `products_ms` what the matrix products of
    the first and the second half take alone. Assumed is that TensorRT's halves resemble each other: if the first takes
    n times its products, the second takes 3/4 n times its own or more (measured on an H100 in bf16: 2.4 and 2.2 times
    for the double block's halves, 2.2 and 2.2 for the single block's). And that whatever runs the first half takes as
    long as its products, or as TensorRT where that is less. Where the first half has no products, nothing is expected.
    """
    if not first_products_ms:
        return None
    slowness = first_ms / first_products_ms
    expected = _SECOND_TO_FIRST * slowness * products_ms
    least = min(first_ms, first_products_ms) + attention_ms + expected
    if least < best_ms:
        return None
    return (
        f"TensorRT's first half takes {slowness:.1f} times its matrix products: a block with its second half is "
        f"expected to take {least:.2f} ms or more, the best block {best_ms:.2f} ms"
    )


def why_not_inductor_half(
    name: SegmentName,
    measured: Mapping[tuple[SegmentName, Backend], float],
    best_ms: float,
    attention_ms: float,
    products_ms: float = 0.0,
) -> str | None:
    """The reason why Inductor's half of a block need not be compiled, or None.

    Inductor's whole block is its two halves with attention between them (H100: 2.04 ms to 2.10, 1.89 to 1.91), so only
    a mix with TensorRT's other half can win. It cannot where eager's other half is as fast as TensorRT's: Inductor's is
    as fast as eager's, so its whole block is as fast as the mix. Nor where TensorRT's half, attention and
    `products_ms`, the least that Inductor's half takes (its matrix products alone), already take as long as the best.
    """
    other = _other_half(name)
    if (WHOLE_SEGMENT[name.kind], Backend.INDUCTOR) not in measured:
        return None
    tensorrt, eager = (measured.get((other, backend)) for backend in (Backend.TENSORRT, Backend.EAGER))
    if tensorrt is None:
        return f"TensorRT has no {other.value} to run beside it"
    if eager is not None and eager <= tensorrt:
        return f"TensorRT's {other.value} beside it takes {tensorrt:.2f} ms, eager's {eager:.2f} ms"
    least = tensorrt + attention_ms + products_ms
    if least < best_ms:
        return None
    return (
        f"with TensorRT's {other.value} and attention it takes {least:.2f} ms or more, the best block {best_ms:.2f} ms"
    )


def _other_half(name: SegmentName) -> SegmentName:
    before, after = SPLIT_SEGMENTS[name.kind]
    return after if name is before else before


def summary(plan: Plan, milliseconds: Mapping[BlockKind, float], depths: Mapping[BlockKind, int]) -> str:
    """One line that says what was chosen and how long the blocks of a step take with it (where that was measured)."""
    if not any(milliseconds.values()):
        return "; ".join(f"{kind.value}: {plan.choice(kind).words()}" for kind in BlockKind)
    parts = [f"{kind.value}: {plan.choice(kind).words()}, {milliseconds[kind]:.2f} ms" for kind in BlockKind]
    total = sum(milliseconds[kind] * depths[kind] for kind in BlockKind)
    return f"{'; '.join(parts)}; {total:.1f} ms per step"


def left_out(measurements: Sequence[Measurement]) -> list[Measurement]:
    return [m for m in measurements if m.left_out]
