"""Operators of our own, for what Inductor must call as it is: in a graph they are one node, whatever they do inside.

Defined by hand: what `torch.library.custom_op` puts around each call took Python longer than all else of a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

_LIBRARIES: list[torch.library.Library] = []
"""An operator lives as long as the library that it was defined in."""


def define(
    module: str, signature: str, on_cuda: Callable[..., Any], on_cpu: Callable[..., Any], shape: Callable[..., Any]
) -> torch._ops.OpOverload:  # fmt: skip
    """The operator of this signature ("name(Tensor x) -> Tensor"), in a namespace of `module` (its `__name__`).

    `shape`: what it returns, without computing it. The namespace is a name of its own where the package is imported
    twice, as a library and as a ComfyUI pack, whose name is a path.
    """
    namespace, name = re.sub(r"\W", "_", module), signature.partition("(")[0]
    library = torch.library.Library(namespace, "FRAGMENT")  # a module may define several
    library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    for device, function in (("CUDA", on_cuda), ("CPU", on_cpu), ("Meta", shape)):
        library.impl(name, function, device)
    _LIBRARIES.append(library)
    return getattr(getattr(torch.ops, namespace), name).default
