"""Who else hooks into a module's forward: found, so that nothing is skipped in silence, and kept by a new class."""

from __future__ import annotations

import types

from torch import nn

from .errors import InvalidOption


def has_own_forward(module: nn.Module) -> bool:
    """Whether this one object runs another forward than its class's. A hook that was removed leaves the class's own
    behind as an attribute, which changes nothing."""
    own = module.__dict__.get("forward")
    return own is not None and not _is_bound(own, type(module))


def find_hooked(module: nn.Module, path: str, accelerate: bool = True) -> str | None:
    """The path of the first module in here that does more than its class, or None.

    Of PEFT's layers only what they wrap counts: their factors are read, not run. `accelerate` False leaves out the
    hooks of that package.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return path
    if has_own_forward(module) and (accelerate or "_hf_hook" not in module.__dict__):
        return path
    base = module._modules.get("base_layer")
    children = module._modules if base is None else {"base_layer": base}
    for name, child in children.items():
        if child is not None and (found := find_hooked(child, f"{path}.{name}", accelerate)):
            return found
    return None


def refuse_foreign_forward(module: nn.Module) -> None:
    """Raises `InvalidOption` where something would run instead of a class's new forward."""
    kept = vars(module).get("_old_forward", vars(module).get("forward"))
    if kept is not None and not _is_bound(kept, type(module)):
        raise InvalidOption(
            "This transformer's forward was already replaced: by a cache, group offload or another program.",
            fix="Call compile_transformer() first, then enable that.",
        )


def swap_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Gives the object another class. The forward that accelerate's offload hook keeps (`_old_forward`), or that a
    removed hook left behind, becomes the new class's."""
    before = type(module)
    module.__class__ = new
    for name in ("_old_forward", "forward"):
        if _is_bound(vars(module).get(name), before):
            vars(module)[name] = types.MethodType(new.forward, module)


def _is_bound(forward: object, kind: type[nn.Module]) -> bool:
    return getattr(forward, "__func__", None) is kind.forward
