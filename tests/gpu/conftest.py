"""GPU tests: run on a machine with an NVIDIA GPU, skipped elsewhere with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One engine cache for all tests of the tier: each engine is built once."""
    return str(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def needs_tensorrt() -> None:
    from trt_core.gpu import current_gpu, why_not_tensorrt

    if reason := why_not_tensorrt(current_gpu()):
        pytest.skip(reason)


@pytest.fixture
def needs_fp8_gpu() -> None:
    from trt_core.gpu import current_gpu, why_not_fp8

    if reason := why_not_fp8(current_gpu()):
        pytest.skip(reason)


@pytest.fixture
def model() -> Any:
    return real_shaped_model()


def real_shaped_model() -> Any:
    """A bf16 FLUX on the GPU with heads of 128 as in the real one, 1 double and 2 single blocks."""
    from tests.unit.tiny_flux import tiny_transformer

    return tiny_transformer(heads=2, head_dim=128, double=1, single=2).to("cuda", torch.bfloat16)


def inputs_of(model: Any, **sizes: int) -> dict[str, Any]:
    from tests.unit.tiny_flux import call_inputs

    arguments = call_inputs(model, **{"height": 16, "width": 24, "text": 32, **sizes})
    return {n: v.to("cuda") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def output_of(model: Callable[..., Any], arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**arguments)
    return result[0] if isinstance(result, tuple) else result.sample


def add_loras(model: Any, targets: list[str]) -> None:
    """Adapters "a" on all of these layers, and "b" on three of them."""
    from peft import LoraConfig

    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        chosen = targets if name == "a" else targets[1:4]
        config = LoraConfig(r=8, lora_alpha=4 + seed, target_modules=chosen, init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
