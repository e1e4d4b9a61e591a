"""The matrix products of a step: what Inductor's blocks multiply, by name and size. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from .architecture import FluxArchitecture
from .catalogue import BlockKind
from .products import Product


def block_products(
    kind: BlockKind, arch: FluxArchitecture, batch: int, img_tokens: int, txt_tokens: int, fp8: bool,
    joined: bool = True,
) -> Mapping[str, Product]:  # fmt: skip
    """The products of a block of this kind, by Black Forest Labs' names of its layers.

    FP8 takes GELU in the kernel that quantizes. bf16 cuts a single block's first layer between attention and MLP, and
    the second one, too, where attention's output and the MLP's are not `joined`.
    """
    if kind is BlockKind.SINGLE:
        return _single(arch, batch * (txt_tokens + img_tokens), fp8, joined)
    streams = (("img", img_tokens), ("txt", txt_tokens))
    return {
        f"{stream}_{layer}": product
        for stream, tokens in streams
        for layer, product in _stream(arch, batch * tokens, fp8).items()
    }


def _stream(arch: FluxArchitecture, rows: int, fp8: bool) -> Mapping[str, Product]:
    hidden, mlp = arch.hidden, arch.mlp_hidden
    return {
        "attn.qkv": Product(rows, 3 * hidden, hidden, fp8),
        "attn.proj": Product(rows, hidden, hidden, fp8),
        "mlp.0": Product(rows, mlp, hidden, fp8, gelu=not fp8),
        "mlp.2": Product(rows, hidden, mlp, fp8),
    }


def _single(arch: FluxArchitecture, rows: int, fp8: bool, joined: bool) -> Mapping[str, Product]:
    hidden, mlp = arch.hidden, arch.mlp_hidden
    whole = {"linear2": Product(rows, hidden, hidden + mlp, fp8)}
    if fp8:
        return {"linear1": Product(rows, 3 * hidden + mlp, hidden, fp8), **whole}
    cut = {
        "linear2, attention": Product(rows, hidden, hidden),
        "linear2, mlp": Product(rows, hidden, mlp, onto=True),
    }
    return {
        "linear1, qkv": Product(rows, 3 * hidden, hidden),
        "linear1, mlp": Product(rows, mlp, hidden, gelu=True),
        **(whole if joined else cut),
    }
