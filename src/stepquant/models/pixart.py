"""PixArt-alpha and PixArt-sigma: `PixArtTransformer2DModel`, a diffusion transformer with cross-attention to text."""

from __future__ import annotations

from typing import Any

from stepquant.models.description import ModelDescription, describe_blocks, numbered


def describe_pixart(model: Any) -> ModelDescription:
    """Blocks: patch embedding, time embedding with its shared modulation, text projection, transformer blocks, output.

    Where image size and aspect ratio are conditions (`use_additional_conditions`), the shared modulation reads them
    with the time, so that only the timestep's own MLP depends on t alone.
    """
    sized = model.adaln_single.emb.use_additional_conditions
    blocks = numbered(model, "transformer_blocks")
    time_layers = [f"adaln_single.emb.timestep_embedder.{layer}" for layer in ("linear_1", "linear_2")]
    return describe_blocks(
        model,
        type(model).__name__,
        [
            "pos_embed.proj",
            "adaln_single.emb",
            "adaln_single.linear",
            *(["caption_projection"] if model.caption_projection is not None else []),
            *blocks,
            "proj_out",
        ],
        first="pos_embed.proj",
        last="proj_out",
        time_layers=time_layers if sized else [*time_layers, "adaln_single.linear"],
        middle=blocks[len(blocks) // 2],
    )
