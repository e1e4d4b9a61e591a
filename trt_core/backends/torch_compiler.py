"""PyTorch's compiler, imported in a thread while the calling one does work that does not need it.

`torch.compile` imports Dynamo when it is first called and Inductor when it first compiles: 3.9 s of the 9.8 s of a warm
first call sampled on an H100, on a machine without Python's bytecode cache. Another 0.5 s went into hashing Triton for
the keys of Inductor's cache, nearly all of it a library that is read and hashed while Python's lock is free.

Only between `import_ahead` and `wait_until_imported` do two threads import, and the calling one must import nothing of
PyTorch's compiler then. Its modules import each other in circles: of two threads that enter such a circle at different
places one would see modules that are not complete. That is why nothing is imported ahead while code of others runs,
such as between `compile_transformer` and the first call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import threading

from ..flux.fused import load_kernels

_LOG = logging.getLogger("trt_core.build")

MODULES = ("torch._dynamo", "torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx")
"""What `torch.compile` and its first compilation import, in that order."""

_starting = threading.Lock()
_threads: list[threading.Thread] = []


def import_ahead() -> None:
    """Begins to import; does nothing where that was begun before. Triton is imported here and now: work that goes on
    meanwhile (LoRA merges, FP8) may need it as well."""
    load_kernels()
    with _starting:
        for target in () if _threads else (_import_compiler, _hash_triton):
            thread = threading.Thread(target=target, daemon=True, name=f"trt_core{target.__name__}")
            thread.start()
            _threads.append(thread)


def wait_until_imported() -> None:
    """Returns when the import has ended, also one that failed: `torch.compile` then imports again, and fails as it does
    without this."""
    with _starting:
        threads = list(_threads)
    for thread in threads:
        thread.join()


def _import_compiler() -> None:
    for name in MODULES:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            _LOG.debug("%s could not be imported ahead: %s", name, error)


def _hash_triton() -> None:
    """Triton keeps the hash, so that Inductor finds it. Where Inductor looks for it (`triton_compat`), newest first: no
    module of PyTorch's is imported here, and Triton's are there already."""
    if importlib.util.find_spec("triton") is None:
        return
    for name in ("triton.runtime.cache", "triton.compiler.compiler"):
        with contextlib.suppress(ImportError, AttributeError, OSError):
            importlib.import_module(name).triton_key()
            return
