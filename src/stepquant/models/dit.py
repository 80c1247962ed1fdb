"""Class-conditional diffusion transformers: `DiTTransformer2DModel`."""

from __future__ import annotations

from typing import Any

from stepquant.models.description import ModelDescription, describe_blocks


def describe_dit(model: Any) -> ModelDescription:
    """Blocks: the patch embedding, each transformer block (with its own modulation), and the two output projections.

    The modulation (``norm1.linear``) reads timestep and class together; only the timestep's own MLP depends on t alone.
    """
    transformer_blocks = [f"transformer_blocks.{index}" for index in range(len(model.transformer_blocks))]
    time_layers = [
        f"{block}.norm1.emb.timestep_embedder.{layer}"
        for block in transformer_blocks
        for layer in ("linear_1", "linear_2")
    ]
    return describe_blocks(
        model,
        type(model).__name__,
        ["pos_embed.proj", *transformer_blocks, "proj_out_1", "proj_out_2"],
        first="pos_embed.proj",
        last="proj_out_2",
        time_layers=time_layers,
        middle=transformer_blocks[len(transformer_blocks) // 2],
    )
