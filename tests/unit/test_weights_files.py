"""LoRA files into bound weights: several at once, at any strength, equal to their sum."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.unit import lora_files as files
from trt_core.config import BaseWeights
from trt_core.lora import load_lora, merged
from trt_core.weights import BoundWeights, file_patches

QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"


def test_several_files_at_their_strengths(tmp_path: Path) -> None:
    shapes = files.tiny_shapes()
    first = files.kohya(files.flat(QKV), *files.factors(shapes[f"{QKV}.weight"], 4, 1), alpha=2.0)
    second = files.peft(QKV, *files.factors(shapes[f"{QKV}.weight"], 2, 2))
    third = files.peft(PROJ, *files.factors(shapes[f"{PROJ}.weight"], 2, 3))
    one, two, off = (
        load_lora(files.write(tmp_path / f"{i}.safetensors", t), shapes) for i, t in enumerate((first, second, third))
    )
    base = {name: tensor.bfloat16() for name, tensor in files.random_base(shapes).items()}
    weights = BoundWeights({name: tensor.clone() for name, tensor in base.items()}, BaseWeights.GPU)
    weights.refit(file_patches([(one, 0.7), (two, -1.0), (off, 0.0)]))
    changes = [(patch, strength) for lora, strength in ((one, 0.7), (two, -1.0)) for patch in lora.patches]
    expected = base | {f"{QKV}.weight": merged(base[f"{QKV}.weight"], changes).bfloat16()}
    assert weights.touched == {f"{QKV}.weight"}
    assert not torch.equal(expected[f"{QKV}.weight"], base[f"{QKV}.weight"])
    assert all(torch.equal(weights.tensors[name], expected[name]) for name in base)
    assert not weights.needs(file_patches([(one, 0.7), (two, -1.0)]))
    assert weights.needs(file_patches([(one, 0.7), (two, -0.5)]))
