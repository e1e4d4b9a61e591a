"""LoRAs on an FP8 model: how much of their change arrives, and that switching leaves no trace."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import model as models
from .fp8_calls import at, call, exact, same_bits
from .fp8_lines import Line

RANK, SWITCHES = 16, 20
LORAS = {0.005: 12, 0.01: 8, 0.05: 4}
"""Size -> how many LoRAs. The gain of a single small one scatters by 0.05 (on an H100 and on a CPU, modulations exact),
and only the mean over several says whether changes arrive whole."""
LORA_CALLS = {0.005: 3, 0.01: 2, 0.05: 1}
"""Size -> calls of each LoRA. A small one changes less than FP8's own error: it takes more numbers to know its gain."""


def lora_name(size: float, index: int = 0) -> str:
    return f"size_{round(size * 1000)}" + (f"_{index}" if index else "")


def lora_names() -> list[str]:
    return [lora_name(size, index) for size, count in LORAS.items() for index in range(count)]


def lora_calls(arguments: dict[str, Tensor], number: int) -> list[dict[str, Tensor]]:
    """Calls with noise and times of their own."""
    latent, found = arguments["hidden_states"], []
    for index in range(number):
        generator = torch.Generator(latent.device).manual_seed(models.SEED + 1 + index)
        noise = torch.randn(latent.shape, generator=generator, device=latent.device)
        found.append(at(arguments, noise, (index + 1) / (number + 1)))
    return found


def lora_gain_lines(ours: Any, wide: Any, arguments: dict[str, Tensor]) -> Iterator[Line]:
    """Adds the adapters, which stay. `wide` reads the same adapters as `ours` and widens them."""
    calls = lora_calls(arguments, max(LORA_CALLS.values()))
    before = [(call(ours, one).float(), call(wide, exact(one))) for one in calls]
    for size, number in LORA_CALLS.items():
        count = LORAS[size]
        names = tuple(lora_name(size, index) for index in range(count))
        layers = models.add_loras(ours, RANK, names, size)
        found = [both_signs(ours, wide, name, calls[:number], before) for name in names]
        each = [gain(changes)["gain"] for changes in found]
        line = {"kind": "lora_gain", "delta": size, "rank": RANK, "layers": layers, "calls": number, "loras": count}
        yield {**line, **gain([change for changes in found for change in changes]), "gains": each,
               "gain_standard_error": statistics.stdev(each) / count**0.5}  # fmt: skip


def both_signs(
    ours: Any, wide: Any, name: str, calls: Sequence[dict[str, Tensor]], before: Sequence[Change]
) -> list[tuple[Change, ...]]:
    """What a LoRA at strength 1 and at -1 changes, call by call."""
    return list(zip(*(changed(ours, wide, name, s, calls, before) for s in (1.0, -1.0)), strict=True))


Change = tuple[Tensor, Tensor]
"""What a LoRA changes of one output: y - y0 of FP8, r - r0 of fp32."""


def changed(
    ours: Any, wide: Any, name: str, strength: float, calls: Sequence[dict[str, Tensor]], before: Sequence[Change]
) -> list[Change]:
    ours.set_adapters(name, strength)
    return [
        (call(ours, one).float() - y0, call(wide, exact(one)) - r0)
        for one, (y0, r0) in zip(calls, before[: len(calls)], strict=True)
    ]


def gain(changes: Sequence[Sequence[Change]]) -> Line:
    """<y - y0, r - r0> / ||r - r0||^2 over all calls, with both signs of the LoRA in each: the error of y0, which is
    larger than the change, then cancels."""
    products = [sum(float(y.double().flatten() @ r.double().flatten()) for y, r in call) for call in changes]
    squares = [sum(float(r.double().square().sum()) for _, r in call) for call in changes]
    ours = sum(float(y.double().square().sum()) for call in changes for y, _ in call)
    return {"gain": sum(products) / sum(squares), "cosine": sum(products) / (ours * sum(squares)) ** 0.5}


State = tuple[tuple[str, float], ...]
"""Adapters with their strengths; none of them is the base."""


def states() -> tuple[State, ...]:
    b, *_, a = map(lora_name, LORA_CALLS)
    return (), ((a, 1.0),), ((b, 1.0),), ((a, 0.5), (b, -1.0))


def switch(model: Any, state: State) -> None:
    if not state:
        model.disable_adapters()
        return
    model.enable_adapters()
    model.set_adapters([name for name, _ in state], [strength for _, strength in state])


class Bits:
    """What one state left behind, to be compared bit for bit: bound weights and scales, and the output."""

    def __init__(self, model: Any, output: Tensor) -> None:
        self._bound = {name: tensor.clone() for name, tensor in bound(model).items()}
        self._output = output

    def differences(self, model: Any, output: Tensor) -> Line:
        """How many bound tensors differ, and whether the output is the same."""
        now = bound(model)
        different = sum(not same_bits(tensor, now[name]) for name, tensor in self._bound.items())
        return {"different_weights": different, "same_output": same_bits(output, self._output)}


def bound(model: Any) -> dict[str, Tensor]:
    """What segments read: diffusers' own parameters show the base at all times."""
    return model._trt_state.module.weights.tensors


def lora_switch_line(model: Any, arguments: dict[str, Tensor]) -> Line:
    """A to none is the base, A to B a fresh B, 20 random switches change nothing; one FP8 copy is held at a time."""
    none, a, b, _ = states()

    def run(state: State) -> Tensor:
        switch(model, state)
        return call(model, arguments)

    base = Bits(model, run(none))
    outputs = {none: base._output, a: run(a)}
    line = {"kind": "lora_switch", "rank": RANK, "tensors": len(bound(model)),
            "a_to_none": base.differences(model, run(none))}  # fmt: skip
    del base
    switch(model, b)
    model.to(model.dtype)  # bound again by the next call: B on a model that has never seen A
    fresh = Bits(model, run(b))
    outputs[b] = fresh._output
    same_a = same_bits(run(a), outputs[a])
    line |= {"a_again_same_output": same_a, "a_to_b": fresh.differences(model, run(b))}
    same, slowest_ms = random_switches(model, run, outputs)
    line |= {"switches": SWITCHES, "switches_same_output": same, "slowest_refit_ms": slowest_ms}
    distinct = sum(not same_bits(one, two) for one, two in itertools.combinations(outputs.values(), 2))
    line["pairs_of_different_outputs"] = f"{distinct} of {math.comb(len(outputs), 2)}"
    return {**line, "after_switches": fresh.differences(model, run(b))}


def random_switches(model: Any, run: Callable[[State], Tensor], outputs: dict[State, Tensor]) -> tuple[int, float]:
    """How many of the switches gave the output that the same adapters gave before, and the slowest refit."""
    chosen, same, slowest_ms = random.Random(models.SEED), 0, 0.0
    outputs.setdefault(states()[-1], run(states()[-1]))
    for _ in range(SWITCHES):
        state = chosen.choice(states())
        same += same_bits(run(state), outputs[state])
        slowest_ms = max(slowest_ms, model.trt_report().last_refit.milliseconds)
    return same, slowest_ms
