"""The numbers that define a FLUX.1 transformer, read from its weights or its diffusers config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModel

_BLOCK = re.compile(r"^(double_blocks|single_blocks)\.(\d+)\.")
_FLUX_ONLY = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FluxArchitecture:
    """FLUX.1 as numbers: dev, schnell, Krea, Kontext and Fill differ only here.

    `in_channels` is 64 (dev, schnell, Krea, Kontext), 384 (Fill) or 128 (Canny, Depth); `out_channels` is 64.
    `axes_dim` are the RoPE dimensions of (index, row, column) and sum to the head dimension.
    """

    hidden: int
    heads: int
    double_depth: int
    single_depth: int
    in_channels: int
    out_channels: int
    context_dim: int
    vec_dim: int
    mlp_hidden: int
    guidance: bool
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.heads <= 0 or self.hidden % self.heads:
            raise UnsupportedModel(f"Hidden size {self.hidden} cannot be cut into {self.heads} heads.")
        if sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise UnsupportedModel(
                f"RoPE dimensions {self.axes_dim} do not fit heads of {self.head_dim}.",
                expected="They must be even and sum to the head dimension.",
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> FluxArchitecture:
        """Reads diffusers' `FluxTransformer2DModel` config; raises `UnsupportedModel` where a number is missing."""
        try:
            if config["patch_size"] != 1:
                raise UnsupportedModel(f"patch_size is {config['patch_size']}; FLUX.1 has 1.")
            hidden = config["attention_head_dim"] * config["num_attention_heads"]
            return cls(
                hidden=hidden,
                heads=config["num_attention_heads"],
                double_depth=config["num_layers"],
                single_depth=config["num_single_layers"],
                in_channels=config["in_channels"],
                out_channels=config["out_channels"] or config["in_channels"],
                context_dim=config["joint_attention_dim"],
                vec_dim=config["pooled_projection_dim"],
                mlp_hidden=4 * hidden,
                guidance=bool(config["guidance_embeds"]),
                axes_dim=tuple(config["axes_dims_rope"]),
            )
        except KeyError as error:
            raise UnsupportedModel(
                f"The model's config has no {error.args[0]!r}.", expected="A FLUX.1 transformer has it."
            ) from error

    @classmethod
    def from_shapes(cls, shapes: Shapes, axes_dim: tuple[int, int, int] | None = None) -> FluxArchitecture:
        """Reads the architecture from BFL weight names and shapes; raises `UnsupportedModel` for anything else.

        `axes_dim` is not stored in weights: None means FLUX's (16, 56, 56), scaled to heads of another size.
        """
        missing = [name for name in _FLUX_ONLY if name not in shapes]
        if missing:
            raise UnsupportedModel(
                f"This is not a FLUX.1 transformer: it has no {missing[0]}.",
                expected="FLUX.1 dev, schnell, Krea, Kontext, Fill, Canny and Depth are supported.",
                widget="model",
            )
        hidden, in_channels = shapes["img_in.weight"]
        head_dim = _head_dim(shapes)
        return cls(
            hidden=hidden,
            heads=hidden // head_dim,
            double_depth=_depth(shapes, "double_blocks"),
            single_depth=_depth(shapes, "single_blocks"),
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0],
            context_dim=shapes["txt_in.weight"][1],
            vec_dim=shapes["vector_in.in_layer.weight"][1],
            mlp_hidden=_mlp_hidden(shapes, hidden),
            guidance="guidance_in.in_layer.weight" in shapes,
            axes_dim=axes_dim or scaled_axes(head_dim),
        )


def scaled_axes(head_dim: int) -> tuple[int, int, int]:
    """FLUX's RoPE dimensions (16, 56, 56 of 128) in the same proportion for another head dimension."""
    first = max(2, head_dim // 16 * 2)
    rest = (head_dim - first) // 4 * 2
    return head_dim - 2 * rest, rest, rest


def _depth(shapes: Shapes, kind: str) -> int:
    indices = {int(m[2]) for name in shapes if (m := _BLOCK.match(name)) and m[1] == kind}
    if indices != set(range(len(indices))):
        gap = min(set(range(max(indices) + 1)) - indices)
        raise UnsupportedModel(f"{kind}.{gap} is missing from the weights.", fix="Load a complete checkpoint.")
    return len(indices)


def _head_dim(shapes: Shapes) -> int:
    for name in ("double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.norm.query_norm.scale"):
        if name in shapes:
            return shapes[name][0]
    raise UnsupportedModel("The weights have no block with q/k norms.", expected="FLUX.1 has them in every block.")


def _mlp_hidden(shapes: Shapes, hidden: int) -> int:
    if "double_blocks.0.img_mlp.0.weight" in shapes:
        return shapes["double_blocks.0.img_mlp.0.weight"][0]
    return shapes["single_blocks.0.linear1.weight"][0] - 3 * hidden
