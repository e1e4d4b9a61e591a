"""ComfyUI as the library's host: progress, cancel, text on nodes, and where engines are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import folder_paths

from ...trt_core.errors import BuildCancelled, TRTError

_FOLDER = "tensorrt"


def register_engine_folder() -> None:
    """Adds models/tensorrt to ComfyUI's folders of that name; other packs' and the user's own stay."""
    folder_paths.add_model_folder_path(_FOLDER, os.path.join(folder_paths.models_dir, _FOLDER))


def engine_folder() -> str:
    """Where compiled engines are kept: below the first folder that ComfyUI knows for "tensorrt"."""
    return os.path.join(folder_paths.get_folder_paths(_FOLDER)[0], "trt_core")


def show(node_id: str, text: str) -> None:
    """Shows `text` on a node until another one comes."""
    from server import PromptServer  # imports this pack's loader: circular at import

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, node_id)


class NodeProgress:
    """Long work shown as a bar and a line on one node, whichever node runs meanwhile."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._stage = ""

    def update(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            show(self._node_id, stage)
        comfy.utils.ProgressBar(max(total, 1), node_id=self._node_id).update_absolute(done)

    def cancelled(self) -> bool:
        return bool(comfy.model_management.processing_interrupted())


@contextmanager
def named(node: str) -> Iterator[None]:
    """Gives every error of the library the node's name; a cancel becomes ComfyUI's own."""
    try:
        yield
    except BuildCancelled as error:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException from error
    except TRTError as error:
        raise with_name(error, node) from error


def with_name(error: TRTError, node: str) -> TRTError:
    """The same error, saying on which node it is and which of its widgets to change."""
    if error.what.startswith(f"{node}: "):
        return error
    where = f'The option is "{error.widget}" on {node}.' if error.widget else ""
    fix = " ".join(part for part in (error.fix, where) if part)
    return type(error)(f"{node}: {error.what}", expected=error.expected, fix=fix, widget=error.widget)
