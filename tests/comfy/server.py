"""What a browser does with ComfyUI's server: queue prompts, read results and errors, cancel, free memory."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.comfy.events import Events
from tests.comfy.graph import Graph, Link

WAIT_SECONDS = 300


class PromptError(RuntimeError):
    """Validation refused the prompt; `node_errors` says which inputs of which nodes."""

    def __init__(self, reply: dict[str, Any]) -> None:
        self.node_errors: dict[str, Any] = reply.get("node_errors", {})
        super().__init__(json.dumps(reply))


class NodeError(RuntimeError):
    """A node raised while the prompt ran."""

    def __init__(self, details: dict[str, Any]) -> None:
        self.node_id: str = details["node_id"]
        self.node_type: str = details["node_type"]
        self.exception: str = details["exception_type"]
        self.message: str = details["exception_message"].strip()
        self.trace = "".join(details.get("traceback", []))
        super().__init__(f"{self.node_type} ({self.node_id}): {self.exception}: {self.message}\n{self.trace}")


class CancelledError(RuntimeError):
    """The prompt was cancelled while `node_type` ran."""

    def __init__(self, details: dict[str, Any]) -> None:
        self.node_id: str = details["node_id"]
        self.node_type: str = details["node_type"]
        super().__init__(f"{self.node_type} ({self.node_id}) was interrupted")


@dataclass(frozen=True)
class Result:
    """A finished prompt. `outputs`: what nodes showed, by node id. `cached`: nodes that did not run again."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    cached: frozenset[str]

    def ui(self, node: Link) -> dict[str, Any]:
        return self.outputs[node.node_id]


class Server:
    """A client of one running server. Calls block; errors of a prompt are raised as the classes above."""

    def __init__(self, url: str, scratch: Path) -> None:
        self.url, self.scratch = url, scratch
        self.client_id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, data: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read()

    def object_info(self, node_type: str) -> dict[str, Any] | None:
        """A node's schema as the frontend sees it, or None."""
        return self.get(f"/object_info/{node_type}").get(node_type)

    def events(self) -> Events:
        """What the server tells this client from now on: progress, texts on nodes. A context manager."""
        return Events(self.url, self.client_id)

    def queue(self, graph: Graph) -> str:
        """Queue a prompt and return its id at once; raises `PromptError`."""
        try:
            reply = self.post("/prompt", {"prompt": graph.prompt(), "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            raise PromptError(json.load(error)) from error
        return json.loads(reply)["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = WAIT_SECONDS) -> Result:
        """The prompt's outputs; raises `NodeError`, `CancelledError` or `TimeoutError`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}").get(prompt_id)
            if history is not None:
                return _result(prompt_id, history)
            time.sleep(0.02)
        raise TimeoutError(f"The prompt did not finish in {seconds:.0f} s.")

    def submit(self, graph: Graph, seconds: float = WAIT_SECONDS) -> Result:
        return self.wait(self.queue(graph), seconds)

    def latent(self, graph: Graph, latent: Link) -> torch.Tensor:
        """Run the graph up to `latent` and return its samples, `[batch, 16, height / 8, width / 8]`, fp32."""
        path = self.scratch / f"{uuid.uuid4().hex}.safetensors"
        graph.add("Test_SaveLatent", samples=latent, path=str(path))
        self.submit(graph)
        return load_file(path)["samples"]

    def interrupt(self, prompt_id: str | None = None) -> None:
        """The frontend's cancel: stops the running prompt, or only the one named."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """The frontend's "free model and node cache"; returns when it is done.

        The worker may take one prompt before it acts on the request; the second prompt here comes after it. Models
        then leave either by being unloaded, or with the node cache's entries that the first prompt does not use.
        """
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})
        for _ in range(2):
            nothing = Graph()
            nothing.add("Test_Nothing", nonce=uuid.uuid4().int % 2**31)
            self.submit(nothing)


def _result(prompt_id: str, history: dict[str, Any]) -> Result:
    messages = dict(history["status"]["messages"])
    if "execution_error" in messages:
        raise NodeError(messages["execution_error"])
    if "execution_interrupted" in messages:
        raise CancelledError(messages["execution_interrupted"])
    return Result(prompt_id, history["outputs"], frozenset(messages["execution_cached"]["nodes"]))
