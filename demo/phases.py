"""The demo's story, and one call of the pipeline with its times."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from .options import Options, Size
from .pipeline import add_lora

GUIDANCE = 3.5


@dataclass(frozen=True, slots=True)
class Phase:
    """One call: with which LoRA (index, None: none) and at which size. `title` is what the user reads."""

    title: str
    lora: int | None
    size: Size


def story(size: Size, loras: int) -> tuple[Phase, ...]:
    """First call, later call, LoRA A, A to B and so on, none again, and a new resolution."""
    switches = [
        Phase(f"LoRA {_letter(i)}" if i == 0 else f"{_letter(i - 1)} to {_letter(i)}", i, size) for i in range(loras)
    ]
    none = [Phase(f"{_letter(loras - 1)} to none", None, size)] if loras else []
    return (
        Phase("first call", None, size),
        Phase("later call", None, size),
        *switches,
        *none,
        Phase("new resolution", None, size.other()),
    )


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


@dataclass(frozen=True, slots=True)
class Take:
    """What one call gave: latents [1, tokens, 64] on the CPU, and times.

    `step_ms` is the median of all steps after the first; `first_step_ms` contains building and refitting.
    """

    latents: Tensor
    seconds: float
    first_step_ms: float
    step_ms: float
    lora_call_ms: float


@dataclass(frozen=True, slots=True)
class Text:
    """The encoded prompt, so that times are the transformer's and the text encoder need not stay on the GPU."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


@torch.no_grad()
def encode(pipe: FluxPipeline, prompt: str, device: torch.device) -> Text:
    """Encodes the prompt and drops T5, the largest encoder (9.5 GB for FLUX.1), from the pipeline."""
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.to(device)
    longest = 512 if pipe.transformer.config.guidance_embeds else 256  # schnell was trained with 256 tokens
    tokens = min(longest, pipe.tokenizer_2.model_max_length)
    embeds, pooled, _ = pipe.encode_prompt(prompt, device=device, max_sequence_length=tokens)
    pipe.text_encoder_2 = None
    return Text(embeds, pooled)


class Performer:
    """Plays phases on a pipeline: changes the LoRA with the pipeline's own calls, then makes latents."""

    def __init__(self, pipe: FluxPipeline, text: Text, loras: Sequence[Path], options: Options) -> None:
        self._pipe, self._text, self._loras, self._options = pipe, text, loras, options
        self._loaded: set[int] = set()

    def play(self, phase: Phase) -> Take:
        return self.draw(phase, self.change(phase))

    def change(self, phase: Phase) -> float:
        """Makes the pipeline use the phase's LoRA alone; milliseconds."""
        return _milliseconds(lambda: self._use(phase.lora))

    def draw(self, phase: Phase, lora_call_ms: float) -> Take:
        stamps: list[float] = []
        start = _now()
        latents = self._call(phase.size, stamps)
        seconds = _now() - start
        later = [after - before for before, after in itertools.pairwise(stamps)]
        return Take(
            latents.float().cpu(),
            seconds,
            (stamps[0] - start) * 1e3,
            statistics.median(later or [stamps[0] - start]) * 1e3,
            lora_call_ms,
        )

    def _call(self, size: Size, stamps: list[float]) -> Tensor:
        return self._pipe(
            prompt_embeds=self._text.prompt_embeds,
            pooled_prompt_embeds=self._text.pooled_prompt_embeds,
            height=size.height_px,
            width=size.width_px,
            num_inference_steps=self._options.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(self._options.seed),
            output_type="latent",
            callback_on_step_end=_stamper(stamps),
        ).images

    def _use(self, lora: int | None) -> None:
        if lora is None:
            self.drop_loras()
            return
        name = f"demo_{lora}"
        if lora not in self._loaded:
            add_lora(self._pipe, self._loras[lora], name)
            self._loaded.add(lora)
        self._pipe.set_adapters(name)

    def drop_loras(self) -> None:
        if self._loaded:
            self._pipe.unload_lora_weights()
            self._loaded.clear()


def _stamper(stamps: list[float]) -> Callable[..., dict[str, Any]]:
    def at_step_end(_pipe: FluxPipeline, _step: int, _timestep: Tensor, _tensors: dict[str, Any]) -> dict[str, Any]:
        stamps.append(_now())
        return {}

    return at_step_end


def _now() -> float:
    """Seconds, after all work that was queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _milliseconds(work: Callable[[], None]) -> float:
    start = _now()
    work()
    return (_now() - start) * 1e3


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Relative L2 distance in float64."""
    result, reference = result.double(), reference.double()
    return ((result - reference).norm() / reference.norm()).item()


@torch.no_grad()
def picture(pipe: FluxPipeline, latents: Tensor, size: Size) -> Any:
    """The PIL image of packed latents, as the pipeline itself decodes them."""
    vae = pipe.vae
    latents = latents.to(vae.device, vae.dtype)
    unpacked = pipe._unpack_latents(latents, size.height_px, size.width_px, pipe.vae_scale_factor)
    decoded = vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor).sample
    return pipe.image_processor.postprocess(decoded)[0]
