"""UNets of diffusers: `UNet2DModel` (pixels, DDPM) and `UNet2DConditionModel` (Stable Diffusion's shape)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepquant.models.description import ModelDescription, describe_blocks, has_layers


def describe_unet(model: Any) -> ModelDescription:
    """Blocks: each residual block, attention, transformer block, sampler, and the layers between them."""
    embeddings = [
        name
        for name in ("time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj", "time_embed_act")
        if has_layers(getattr(model, name, None))
    ]
    blocks = [*embeddings, "conv_in"]
    for index, stage in enumerate(model.down_blocks):
        blocks += _stage_blocks(f"down_blocks.{index}", stage)
    if model.mid_block is not None:
        blocks += _mid_blocks("mid_block", model.mid_block)
    for index, stage in enumerate(model.up_blocks):
        blocks += _stage_blocks(f"up_blocks.{index}", stage)
    blocks.append("conv_out")
    time_layers = ["time_embedding.linear_1", "time_embedding.linear_2"]
    if not {"class_embedding", "add_embedding"} & set(embeddings):  # else they are added before the blocks project it
        time_layers += [name for name, _ in model.named_modules() if name.endswith("time_emb_proj")]
    return describe_blocks(
        model,
        type(model).__name__,
        blocks,
        first="conv_in",
        last="conv_out",
        time_layers=time_layers,
        middle="mid_block" if model.mid_block is not None else f"down_blocks.{len(model.down_blocks) - 1}",
        skip_splits=_skip_splits(model),
    )


def _stage_blocks(path: str, stage: Any) -> Iterator[str]:
    attentions = getattr(stage, "attentions", None) or []
    for index in range(len(stage.resnets)):
        yield f"{path}.resnets.{index}"
        if index < len(attentions):
            yield from _attention_blocks(f"{path}.attentions.{index}", attentions[index])
    for kind in ("downsamplers", "upsamplers"):
        for index, sampler in enumerate(getattr(stage, kind, None) or []):
            if has_layers(sampler):
                yield f"{path}.{kind}.{index}"


def _mid_blocks(path: str, stage: Any) -> Iterator[str]:
    """Residual blocks with the attentions between them: r0, a0, r1, a1, r2, ..."""
    yield f"{path}.resnets.0"
    for index, attention in enumerate(stage.attentions):
        if attention is not None:
            yield from _attention_blocks(f"{path}.attentions.{index}", attention)
        if index + 1 < len(stage.resnets):
            yield f"{path}.resnets.{index + 1}"


def _attention_blocks(path: str, attention: Any) -> Iterator[str]:
    """A bare attention is one block; a transformer is split into its projections and each of its blocks."""
    if not hasattr(attention, "transformer_blocks"):
        yield path
        return
    yield f"{path}.proj_in"
    for index in range(len(attention.transformer_blocks)):
        yield f"{path}.transformer_blocks.{index}"
    yield f"{path}.proj_out"


def _skip_splits(model: Any) -> dict[str, int]:
    """Every resnet of an up block reads ``cat([trunk, skip])``; the trunk is the output of the module before it."""
    splits: dict[str, int] = {}
    trunk = model.mid_block.resnets[-1].out_channels if model.mid_block is not None else _bottom_channels(model)
    for stage_index, stage in enumerate(model.up_blocks):
        for index, resnet in enumerate(stage.resnets):
            path = f"up_blocks.{stage_index}.resnets.{index}"
            for layer in ("conv1", "conv_shortcut"):
                if getattr(resnet, layer, None) is not None:
                    splits[f"{path}.{layer}"] = trunk
            trunk = resnet.out_channels
    return splits


def _bottom_channels(model: Any) -> int:
    return model.down_blocks[-1].resnets[-1].out_channels
