"""What long work asks of the program around it: show progress, and say whether the user cancelled."""

from __future__ import annotations

from typing import Protocol

from .errors import BuildCancelled


class Progress(Protocol):
    """ComfyUI's progress bar, a terminal bar, or nothing: all the library asks of its host."""

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of `stage` are finished."""

    def cancelled(self) -> bool:
        """Whether the user asked to stop."""


class Silent:
    """Progress that shows nothing and is never cancelled."""

    def update(self, stage: str, done: int, total: int) -> None:
        return None

    def cancelled(self) -> bool:
        return False


def stop_if_cancelled(progress: Progress, stage: str) -> None:
    """Raises `BuildCancelled` if the user cancelled."""
    if progress.cancelled():
        raise BuildCancelled(f"Cancelled during: {stage}.", fix="Run again to continue; finished engines are cached.")
