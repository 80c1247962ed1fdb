"""The tokenizer and text encoder of ``emoji-ldm``, small enough for training on the captions only."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 16
"""Tokens of a prompt, including start and end."""
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: Iterable[str], vocabulary: int = 1200) -> CLIPTokenizer:
    """A CLIP tokenizer with a byte-pair vocabulary of `captions`, and every letter and digit as a word."""
    pattern = CLIPTokenizer()._tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    learner.normalizer, learner.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, END],
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator([*captions, *string.ascii_lowercase, *string.digits], trainer)
    model = json.loads(learner.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], model_max_length=LENGTH
    )


def classic_files(tokenizer: CLIPTokenizer) -> dict[str, str]:
    """``vocab.json`` and ``merges.txt`` for transformers 4; version 5 reads ``tokenizer.json``."""
    model = json.loads(tokenizer._tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": f"#version: 0.2\n{merges}\n"}


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 128) -> CLIPTextModel:
    """Two CLIP layers; hidden states float [B, 16, width]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
