"""Language models as text encoders, with random weights, and their tokenizers."""

from __future__ import annotations

from typing import Any

import transformers

from tests.families.parts import WIDTH, seeded, tokenizer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template in the format of Qwen."""

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

SHAPE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 3,
    "eos_token_id": 1,
}  # fmt: skip
"""Shape of every language model."""


def chat_tokenizer() -> Any:
    """Return a tokenizer with a chat template and the special tokens of Qwen."""
    return tokenizer(*CHAT_TOKENS, *IMAGE_TOKENS, template=CHAT, length=2048)


def language_model(model: Any, **config: Any) -> Any:
    """Return a model of a class of transformers, such as ``transformers.Qwen3Model``."""
    return seeded(model, 1, config=model.config_class(**(SHAPE | config)))


def qwen_vl(model: Any = transformers.Qwen2_5_VLForConditionalGeneration) -> Any:
    """Return a Qwen2.5-VL with two layers of text and one of vision."""
    words = chat_tokenizer()
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0], "window_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=SHAPE
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    return seeded(model, 1, config=config)


def qwen_vl_processor() -> Any:
    """Return the processor of text and images of Qwen2.5-VL; needs torchvision."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2),
        tokenizer=chat_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(size=size, patch_size=14, merge_size=2),
        chat_template=CHAT,
    )


def qwen3_vl() -> Any:
    """Return a Qwen3-VL without its output layer."""
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(text_config=SHAPE | {"rope_parameters": rope}, vision_config=vision)
    return seeded(transformers.Qwen3VLModel, 1, config=config)


def mistral3(model: Any) -> Any:
    """Return a Mistral 3, with or without its output layer."""
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=SHAPE | {"model_type": "mistral"}, vision_config=vision, image_token_index=6
    )
    return seeded(model, 1, config=config)
