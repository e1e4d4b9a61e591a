"""The precision of every block of a model, from its FP8 recipe, and each block's weights in its segments' order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .execution import BlockWeights
from .flux.architecture import FluxArchitecture
from .flux.catalogue import BlockKind
from .flux.precision import PLAIN, Precision
from .flux.weights import DOUBLE_OUT, DOUBLE_QKV, SINGLE_OUT, SINGLE_QKV_MLP
from .fp8_recipe import Activations, Fp8Recipe, Granularity


@dataclass(frozen=True, slots=True)
class BlockPrecisions:
    """One precision per block, by its index."""

    double: tuple[Precision, ...]
    single: tuple[Precision, ...]

    @classmethod
    def plain(cls, arch: FluxArchitecture) -> BlockPrecisions:
        return cls((PLAIN,) * arch.double_depth, (PLAIN,) * arch.single_depth)

    @classmethod
    def of(cls, arch: FluxArchitecture, recipe: Fp8Recipe | None) -> BlockPrecisions:
        if recipe is None:
            return cls.plain(arch)
        return cls(
            tuple(_precision(recipe, f"double_blocks.{i}.") for i in range(arch.double_depth)),
            tuple(_precision(recipe, f"single_blocks.{i}.") for i in range(arch.single_depth)),
        )

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


def _precision(recipe: Fp8Recipe, block: str) -> Precision:
    layers = frozenset(n.removeprefix(block) for n in recipe.activation_linears if n.startswith(block))
    if not layers:
        return PLAIN
    config = recipe.config
    return Precision(layers, config.granularity is Granularity.ROW, config.activations is Activations.STATIC)


def _weights(
    tensors: Mapping[str, Tensor], block: str, precision: Precision, before: tuple[str, ...], after: tuple[str, ...]
) -> BlockWeights:
    return BlockWeights(
        [tensors[block + name] for name in precision.inputs(before)],
        [tensors[block + name] for name in precision.inputs(after)],
    )
