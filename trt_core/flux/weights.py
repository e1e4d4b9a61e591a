"""Names and shapes of every weight of a FLUX.1 transformer in Black Forest Labs' layout, and diffusers' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import UnsupportedModel
from .architecture import FluxArchitecture

_STREAM_QKV = ("attn.qkv.weight", "attn.qkv.bias", "attn.norm.query_norm.scale", "attn.norm.key_norm.scale")
_STREAM_OUT = (
    "attn.proj.weight",
    "attn.proj.bias",
    "mlp.0.weight",
    "mlp.0.bias",
    "mlp.2.weight",
    "mlp.2.bias",
)

DOUBLE_QKV = tuple(f"{stream}_{name}" for stream in ("img", "txt") for name in _STREAM_QKV)
DOUBLE_OUT = tuple(f"{stream}_{name}" for stream in ("img", "txt") for name in _STREAM_OUT)
SINGLE_QKV_MLP = ("linear1.weight", "linear1.bias", "norm.query_norm.scale", "norm.key_norm.scale")
SINGLE_OUT = ("linear2.weight", "linear2.bias")


@dataclass(frozen=True, slots=True)
class Part:
    """Where rows `start:stop` of a BFL weight come from in a diffusers model."""

    source: str
    start: int
    stop: int


def weight_shapes(arch: FluxArchitecture) -> dict[str, tuple[int, ...]]:
    """BFL name -> shape for the whole transformer. Matrices are [out, in], as PyTorch's Linear holds them."""
    shapes = dict(_stem_shapes(arch))
    for index in range(arch.double_depth):
        shapes.update({f"double_blocks.{index}.{n}": s for n, s in double_block_shapes(arch).items()})
    for index in range(arch.single_depth):
        shapes.update({f"single_blocks.{index}.{n}": s for n, s in single_block_shapes(arch).items()})
    return shapes


def double_block_shapes(arch: FluxArchitecture) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for stream in ("img", "txt"):
        shapes |= _linear(f"{stream}_mod.lin", 6 * arch.hidden, arch.hidden)
        shapes |= _linear(f"{stream}_attn.qkv", 3 * arch.hidden, arch.hidden)
        shapes |= _norms(f"{stream}_attn.norm", arch.head_dim)
        shapes |= _linear(f"{stream}_attn.proj", arch.hidden, arch.hidden)
        shapes |= _linear(f"{stream}_mlp.0", arch.mlp_hidden, arch.hidden)
        shapes |= _linear(f"{stream}_mlp.2", arch.hidden, arch.mlp_hidden)
    return shapes


def single_block_shapes(arch: FluxArchitecture) -> dict[str, tuple[int, ...]]:
    return (
        _linear("modulation.lin", 3 * arch.hidden, arch.hidden)
        | _linear("linear1", 3 * arch.hidden + arch.mlp_hidden, arch.hidden)
        | _norms("norm", arch.head_dim)
        | _linear("linear2", arch.hidden, arch.hidden + arch.mlp_hidden)
    )


def check_complete(arch: FluxArchitecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `UnsupportedModel` that names the first missing, extra or wrongly shaped weight."""
    expected = weight_shapes(arch)
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise UnsupportedModel(
            f"{len(missing)} weights are missing, the first is {missing[0]}.",
            fix="Load a complete checkpoint.",
        )
    extra = [name for name in shapes if name not in expected]
    if extra:
        raise UnsupportedModel(
            f"{len(extra)} weights do not belong to FLUX.1, the first is {extra[0]}.",
            fix="Load a plain FLUX.1 checkpoint; adapters are applied on top of it.",
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise UnsupportedModel(f"{name} has shape {tuple(shapes[name])}.", expected=f"Expected {shape}.")


def diffusers_parts(arch: FluxArchitecture) -> dict[str, tuple[Part, ...]]:
    """BFL name -> the diffusers parameters that fill its rows, in order of rows.

    Source of the correspondence: diffusers' `scripts/convert_flux_to_diffusers.py`. Two weights have their halves
    swapped (`final_layer.adaLN_modulation.1`: BFL is shift, scale; diffusers' `norm_out.linear` is scale, shift), which
    the order of parts cannot say; `SWAPPED_HALVES` names them.
    """
    shapes = weight_shapes(arch)
    parts: dict[str, tuple[Part, ...]] = {}
    for name, sources in _sources(arch):
        for suffix, source_suffix in _suffixes(name):
            full = name + suffix
            parts[full] = tuple(_rows(shapes[full][0], [s + source_suffix for s in sources], arch))
    return parts


SWAPPED_HALVES = ("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias")


def _suffixes(name: str) -> tuple[tuple[str, str], ...]:
    if name.endswith("_norm"):
        return ((".scale", ".weight"),)
    return ((".weight", ".weight"), (".bias", ".bias"))


def _rows(total: int, sources: list[str], arch: FluxArchitecture) -> Iterator[Part]:
    start = 0
    for index, source in enumerate(sources):
        stop = total if index == len(sources) - 1 else start + arch.hidden
        yield Part(source, start, stop)
        start = stop


def _sources(arch: FluxArchitecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "img_in", ("x_embedder",)
    yield "txt_in", ("context_embedder",)
    embedders = [("time_in", "timestep_embedder"), ("vector_in", "text_embedder")]
    if arch.guidance:
        embedders.append(("guidance_in", "guidance_embedder"))
    for ours, theirs in embedders:
        yield f"{ours}.in_layer", (f"time_text_embed.{theirs}.linear_1",)
        yield f"{ours}.out_layer", (f"time_text_embed.{theirs}.linear_2",)
    yield "final_layer.linear", ("proj_out",)
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",)
    for index in range(arch.double_depth):
        for ours, theirs in _DOUBLE_SOURCES:
            yield f"double_blocks.{index}.{ours}", tuple(f"transformer_blocks.{index}.{t}" for t in theirs)
    for index in range(arch.single_depth):
        for ours, theirs in _SINGLE_SOURCES:
            yield (
                f"single_blocks.{index}.{ours}",
                tuple(f"single_transformer_blocks.{index}.{t}" for t in theirs),
            )


_DOUBLE_SOURCES = (
    ("img_mod.lin", ("norm1.linear",)),
    ("txt_mod.lin", ("norm1_context.linear",)),
    ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("img_attn.norm.query_norm", ("attn.norm_q",)),
    ("img_attn.norm.key_norm", ("attn.norm_k",)),
    ("txt_attn.norm.query_norm", ("attn.norm_added_q",)),
    ("txt_attn.norm.key_norm", ("attn.norm_added_k",)),
    ("img_attn.proj", ("attn.to_out.0",)),
    ("txt_attn.proj", ("attn.to_add_out",)),
    ("img_mlp.0", ("ff.net.0.proj",)),
    ("img_mlp.2", ("ff.net.2",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)),
    ("txt_mlp.2", ("ff_context.net.2",)),
)
_SINGLE_SOURCES = (
    ("modulation.lin", ("norm.linear",)),
    ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    ("norm.query_norm", ("attn.norm_q",)),
    ("norm.key_norm", ("attn.norm_k",)),
    ("linear2", ("proj_out",)),
)


def _linear(name: str, out: int, in_: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, in_), f"{name}.bias": (out,)}


def _norms(name: str, head_dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.query_norm.scale": (head_dim,), f"{name}.key_norm.scale": (head_dim,)}


def _stem_shapes(arch: FluxArchitecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = _linear("img_in", arch.hidden, arch.in_channels) | _linear("txt_in", arch.hidden, arch.context_dim)
    embedders = [("time_in", 256), ("vector_in", arch.vec_dim)] + ([("guidance_in", 256)] if arch.guidance else [])
    for name, width in embedders:
        shapes |= _linear(f"{name}.in_layer", arch.hidden, width)
        shapes |= _linear(f"{name}.out_layer", arch.hidden, arch.hidden)
    shapes |= _linear("final_layer.linear", arch.out_channels, arch.hidden)
    shapes |= _linear("final_layer.adaLN_modulation.1", 2 * arch.hidden, arch.hidden)
    return iter(shapes.items())
