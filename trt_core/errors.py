"""Every error a user can meet, in one small hierarchy.

The facts are attributes and the class writes the sentence: what happened, what was expected, what to do.
"""

from __future__ import annotations


class TRTError(RuntimeError):
    """Base of every error this library raises on purpose.

    `what` happened, what was `expected` instead, and the `fix` the user can apply. `widget` names the option that
    the user would change; the ComfyUI adapter writes the node's name before it.
    """

    def __init__(self, what: str, *, expected: str = "", fix: str = "", widget: str = "") -> None:
        self.what, self.expected, self.fix, self.widget = what, expected, fix, widget
        super().__init__(" ".join(part for part in (what, expected, fix) if part))


class InvalidOption(TRTError):
    """An option has a value that does not exist or does not fit the others."""


class UnsupportedModel(TRTError):
    """The model is not a FLUX.1 transformer, or its weights are incomplete."""


class UnsupportedGPU(TRTError):
    """This GPU (or no GPU) cannot do what was asked for."""


class MissingDependency(TRTError):
    """A package is missing or has the wrong version; `fix` names the line to install it."""


class ShapeOutsideProfile(TRTError):
    """An image, text or batch size lies outside what the engines were built for."""


class InvalidFile(TRTError):
    """A file is missing, truncated, of another format, or holds NaN."""


class LoraMismatch(TRTError):
    """A LoRA does not fit this architecture: unknown keys or wrong shapes."""


class BuildFailed(TRTError):
    """A segment could not be compiled, or the compiled segment computes something else than PyTorch."""


class BuildCancelled(TRTError):
    """The user cancelled a build, a measurement or a refit; everything from before stays usable."""


class OutOfMemory(TRTError):
    """The GPU ran out of memory in a build or a refit; the weights from before are still valid."""


class CacheError(TRTError):
    """The engine cache cannot be written, or a bundle cannot be imported."""


def first_line(error: BaseException) -> str:
    """What another program's error says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
