"""Tiny but real tokenizers for the demo checkpoint, in the files that Hugging Face writes for FLUX's two."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram

WORDS = (
    "photo",
    "painting",
    "cat",
    "robot",
    "castle",
    "forest",
    "city",
    "light",
    "red",
    "blue",
    "with",
    "the",
)
"""Words that are one token each; all others are spelled letter by letter."""

CLIP_TOKENS = 77
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
T5_SPECIAL = ("<pad>", "</s>", "<unk>")


def write_clip_tokenizer(folder: Path) -> int:
    """Writes a byte-level BPE for `CLIPTokenizer` and returns its vocabulary's size; end of text is last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for word in WORDS for pair in _merges(word)]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(pieces), CLIP_BOS, CLIP_EOS]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in dict.fromkeys(merges)), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": CLIP_BOS,
            "eos_token": CLIP_EOS,
            "unk_token": CLIP_EOS,
            "pad_token": CLIP_EOS,
            "model_max_length": CLIP_TOKENS,
        },
    )
    return len(tokens)


def _merges(word: str) -> list[tuple[str, str]]:
    """The merges that join a word from left to right; `</w>` marks its last letter, as CLIP does."""
    letters = [*word[:-1], word[-1] + "</w>"]
    return [("".join(letters[:end]), letters[end]) for end in range(1, len(letters))]


def write_t5_tokenizer(folder: Path, max_tokens: int) -> int:
    """Writes a Unigram model for `T5TokenizerFast` and returns the size of its vocabulary."""
    letters = sorted(set(string.printable) - set(string.whitespace))
    words = [("▁" + word, -4.0) for word in WORDS]
    pieces = [*((token, 0.0) for token in T5_SPECIAL), ("▁", -2.0), *words, *((one, -8.0) for one in letters)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(list(T5_SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5Tokenizer",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_ids": 0,
            "model_max_length": max_tokens,
        },
    )
    return len(pieces)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
