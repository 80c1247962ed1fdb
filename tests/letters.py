"""A tokenizer for text encoders with random weights."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def letter_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer whose vocabulary is single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
