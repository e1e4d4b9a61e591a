"""Progress for programs that run in a terminal."""

from __future__ import annotations

import logging

_LOG = logging.getLogger("trt_core.progress")


class TerminalProgress:
    """A tqdm bar per stage where tqdm is installed (diffusers brings it), else log lines. Ctrl-C cancels."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar = None

    def update(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._finish()
            self._stage = stage
            self._bar = _bar(stage, total)
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()
        else:
            _LOG.debug("%s: %d of %d", stage, done, total)
        if done >= total:
            self._finish()

    def cancelled(self) -> bool:
        return False  # Ctrl-C arrives as KeyboardInterrupt, which every long step lets through

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""


def _bar(stage: str, total: int):
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=stage, leave=False, unit="step")
