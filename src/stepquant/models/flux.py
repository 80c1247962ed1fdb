"""Flux: `FluxTransformer2DModel`, double-stream joint blocks followed by single-stream ones."""

from __future__ import annotations

from typing import Any

from stepquant.models.description import ModelDescription, describe_blocks, numbered


def describe_flux(model: Any) -> ModelDescription:
    """Blocks: image embedding, embedding of time, guidance and pooled text, text embedding, both kinds of blocks,
    output.

    The pipeline passes ``t / 1000``, in [0, 1]. Guidance-distilled models (dev) embed the guidance scale beside the
    time; only the timestep's own MLP depends on t alone.
    """
    double, single = numbered(model, "transformer_blocks"), numbered(model, "single_transformer_blocks")
    blocks = [*double, *single]
    return describe_blocks(
        model,
        type(model).__name__,
        ["x_embedder", "time_text_embed", "context_embedder", *blocks, "norm_out.linear", "proj_out"],
        first="x_embedder",
        last="proj_out",
        time_layers=[f"time_text_embed.timestep_embedder.{layer}" for layer in ("linear_1", "linear_2")],
        middle=blocks[len(blocks) // 2],
        time_unit=1e-3,
    )
