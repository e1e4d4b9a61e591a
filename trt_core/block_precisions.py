"""The precision of every block of a model, from its FP8 recipe, and each block's weights in its segments' order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .execution import BlockWeights
from .flux.architecture import FluxArchitecture
from .flux.catalogue import BlockKind
from .flux.fp8_attention import logit_noise
from .flux.precision import CORRECTED_BIAS, PLAIN, Precision
from .flux.weights import DOUBLE_OUT, DOUBLE_QKV, SINGLE_OUT, SINGLE_QKV_MLP
from .fp8_recipe import Activations, Fp8Recipe, Granularity

LARGEST_LOGIT_NOISE = 0.1
"""rms error of a logit up to which attention may be in E4M3: a probability is then off by 10 %, where those of norms
with weights around 1 are off by 4 % and each E4M3 product of a block by 4 %. Weights around 3 (0.34) are beyond it."""
NORMS = (".query_norm.scale", ".key_norm.scale")


@dataclass(frozen=True, slots=True)
class BlockPrecisions:
    """One precision per block, by its index."""

    double: tuple[Precision, ...]
    single: tuple[Precision, ...]

    @classmethod
    def plain(cls, arch: FluxArchitecture) -> BlockPrecisions:
        return cls((PLAIN,) * arch.double_depth, (PLAIN,) * arch.single_depth)

    @classmethod
    def of(
        cls, arch: FluxArchitecture, recipe: Fp8Recipe | None, tensors: Mapping[str, Tensor] | None = None
    ) -> BlockPrecisions:
        """`tensors` by BFL name: which blocks' norms let attention be in E4M3; None: no block's."""
        if recipe is None:
            return cls.plain(arch)
        double = [f"double_blocks.{i}." for i in range(arch.double_depth)]
        single = [f"single_blocks.{i}." for i in range(arch.single_depth)]
        quiet = set() if tensors is None else _quiet_blocks([*double, *single], tensors)
        found = {block: _precision(recipe, block, block in quiet) for block in (*double, *single)}
        return cls(tuple(found[block] for block in double), tuple(found[block] for block in single))

    def weights(self, tensors: Mapping[str, Tensor]) -> tuple[list[BlockWeights], list[BlockWeights]]:
        """The weights of all double and of all single blocks, out of tensors by BFL name."""
        double = [
            _weights(tensors, f"double_blocks.{i}.", p, DOUBLE_QKV, DOUBLE_OUT) for i, p in enumerate(self.double)
        ]
        single = [
            _weights(tensors, f"single_blocks.{i}.", p, SINGLE_QKV_MLP, SINGLE_OUT) for i, p in enumerate(self.single)
        ]
        return double, single

    def samples(
        self, double: Sequence[BlockWeights], single: Sequence[BlockWeights]
    ) -> dict[tuple[BlockKind, Precision], BlockWeights]:
        """The weights of one block of each kind and precision."""
        doubles = {(BlockKind.DOUBLE, p): weights for p, weights in zip(self.double, double, strict=True)}
        return doubles | {(BlockKind.SINGLE, p): weights for p, weights in zip(self.single, single, strict=True)}


def _quiet_blocks(blocks: Sequence[str], tensors: Mapping[str, Tensor]) -> set[str]:
    """Blocks in which rounding q and k to E4M3 moves no logit by more than `LARGEST_LOGIT_NOISE`."""
    noises = [_largest_noise(block, tensors) for block in blocks]
    values = torch.stack(noises).tolist() if noises else []  # one wait for the GPU, not one per block
    return {block for block, noise in zip(blocks, values, strict=True) if noise <= LARGEST_LOGIT_NOISE}


def _largest_noise(block: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Of any stream's queries with any stream's keys: text and image attend to each other."""
    streams = [f"{block}{stream}norm" for stream in (("img_attn.", "txt_attn.") if "double" in block else ("",))]
    queries, keys = ([tensors[stream + norm] for stream in streams] for norm in NORMS)
    return torch.stack([logit_noise(q, k) for q, k in itertools.product(queries, keys)]).amax()


def _precision(recipe: Fp8Recipe, block: str, quiet: bool) -> Precision:
    layers = frozenset(n.removeprefix(block) for n in recipe.activation_linears if n.startswith(block))
    if not layers:
        return PLAIN
    config = recipe.config
    per_row, static = config.granularity is Granularity.ROW, config.activations is Activations.STATIC
    return Precision(layers, per_row, static, quiet)


def _weights(
    tensors: Mapping[str, Tensor], block: str, precision: Precision, before: tuple[str, ...], after: tuple[str, ...]
) -> BlockWeights:
    return BlockWeights(*([_read(tensors, block + n) for n in precision.inputs(names)] for names in (before, after)))


def _read(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor that a block reads under this name."""
    layer, _, kind = name.rpartition(".")
    corrected = tensors.get(f"{layer}.{CORRECTED_BIAS}") if kind == "bias" else None
    return tensors[name] if corrected is None else corrected
