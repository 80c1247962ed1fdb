"""Transformers with joint attention over text and image: `SD3Transformer2DModel`."""

from __future__ import annotations

from typing import Any

from stepquant.models.description import ModelDescription, describe_blocks, numbered


def describe_sd3(model: Any) -> ModelDescription:
    """Blocks: patch embedding, time and pooled-text embedding, text embedding, joint blocks, output.

    Every block's modulation reads time and pooled text together; only the timestep's own MLP depends on t alone.
    """
    blocks = numbered(model, "transformer_blocks")
    return describe_blocks(
        model,
        type(model).__name__,
        ["pos_embed.proj", "time_text_embed", "context_embedder", *blocks, "norm_out.linear", "proj_out"],
        first="pos_embed.proj",
        last="proj_out",
        time_layers=[f"time_text_embed.timestep_embedder.{layer}" for layer in ("linear_1", "linear_2")],
        middle=blocks[len(blocks) // 2],
    )
