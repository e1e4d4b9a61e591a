"""Workflows as ComfyUI's API takes them: a small builder, and the FLUX graph that most tests start from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

_nonces = itertools.count(1)


@dataclass(frozen=True)
class Link:
    """One output of a node; given as an input, it connects."""

    node_id: str
    output: int = 0

    def __getitem__(self, output: int) -> Link:
        return Link(self.node_id, output)


class Graph:
    """A prompt in the making. `add` returns the node's first output."""

    def __init__(self) -> None:
        self._nodes: dict[str, dict[str, Any]] = {}

    def add(self, node_type: str, /, **inputs: Any) -> Link:
        node_id = str(len(self._nodes) + 1)
        self._nodes[node_id] = {
            "class_type": node_type,
            "inputs": {name: _wire(value) for name, value in inputs.items() if value is not None},
        }
        return Link(node_id)

    def prompt(self) -> dict[str, dict[str, Any]]:
        return self._nodes


class FluxGraph(Graph):
    """The usual FLUX graph. Each instance samples anew while loaders stay cached: `text` has a new nonce."""

    def __init__(self) -> None:
        super().__init__()
        self.nonce = next(_nonces)

    def unet(self, name: str = "flux_dev.safetensors", weight_dtype: str = "default") -> Link:
        return self.add("UNETLoader", unet_name=name, weight_dtype=weight_dtype)

    def lora(self, model: Link, name: str, strength: float = 1.0) -> Link:
        return self.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)

    def text(
        self,
        seed: int = 1,
        tokens: int = 32,
        *,
        batch: int = 1,
        guidance: float = 3.5,
        guidance_mode: str = "value",
    ) -> Link:
        """Random conditioning. `guidance_mode`: "value", "default" (not set) or "none" (switched off)."""
        return self.add(
            "Test_Conditioning",
            seed=seed,
            tokens=tokens,
            batch=batch,
            guidance=guidance,
            guidance_mode=guidance_mode,
            nonce=self.nonce,
        )

    def empty_latent(self, width: int = 256, height: int = 256, batch: int = 1) -> Link:
        return self.add("EmptySD3LatentImage", width=width, height=height, batch_size=batch)

    def picture(self, seed: int = 3, width: int = 256, height: int = 256, batch: int = 1) -> Link:
        """A random latent, like an encoded picture: a start, a Kontext reference or what Fill fills."""
        return self.add("Test_RandomLatent", seed=seed, width=width, height=height, batch=batch)

    def sample(
        self,
        model: Link,
        positive: Link,
        *,
        negative: Link | None = None,
        latent: Link | None = None,
        seed: int = 7,
        steps: int = 4,
        cfg: float = 1.0,
        sampler: str = "euler",
        scheduler: str = "simple",
        denoise: float = 1.0,
    ) -> Link:
        """KSampler, from an empty 256 px latent unless given one; without `negative`, `positive` is both."""
        return self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative or positive,
            latent_image=latent or self.empty_latent(),
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=denoise,
        )


def _wire(value: Any) -> Any:
    return [value.node_id, value.output] if isinstance(value, Link) else value
