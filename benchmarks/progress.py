"""What a process is doing, on standard error: one that is stopped at its limit has said where its time went."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY_SECONDS = 10.0
_IMPORTED = time.time()


class Progress:
    """Words with the seconds since `started` (of `time.time`, which another process may have read; None: since this
    module was imported)."""

    def __init__(self, name: str, started: float | None = None) -> None:
        self._name, self._started = name, _IMPORTED if started is None else started

    def say(self, words: str) -> None:
        sys.stderr.write(f"{self._name}, {time.time() - self._started:5.1f} s: {words}\n")
        sys.stderr.flush()

    @contextmanager
    def phase(self, words: str, every_seconds: float = _EVERY_SECONDS) -> Iterator[None]:
        """Says when it begins and ends, and in between now and then how much PyTorch has compiled."""
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(words, done, every_seconds), daemon=True)
        self.say(words)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        self.say(f"{words}: done; {compiled()}")

    def _watch(self, words: str, done: threading.Event, every_seconds: float) -> None:
        while not done.wait(every_seconds):
            self.say(f"{words}: still at it; {compiled()}")


def compiled() -> str:
    """What torch.compile has done in this process so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return "nothing compiled"
    captured = utils.counters["stats"]["unique_graphs"]
    misses, hits = (utils.counters["inductor"][f"fxgraph_cache_{what}"] for what in ("miss", "hit"))
    return f"{captured} graphs captured, Inductor compiled {misses} and read {hits}"
