"""Names of Stable Diffusion's weights in files of a whole model, as its authors and Civitai distribute them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def whole_model(pipeline: Any) -> dict[str, Tensor]:
    """Weights of a Stable Diffusion pipeline under the original names."""
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    layers, ups = pipeline.unet.config.layers_per_block, len(pipeline.vae.config.up_block_types)
    state = {f"model.diffusion_model.{unet_name(name, layers)}": tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        original = vae_name(name, ups)
        projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", original)
        state[f"first_stage_model.{original}"] = tensor[..., None, None] if projection else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def unet_name(name: str, layers: int) -> str:
    layer, _, kind = name.rpartition(".")
    if layer in ENDS:
        return f"{ENDS[layer]}.{kind}"
    path, _, part = name.partition("resnets.")
    if part:
        index, _, rest = part.partition(".")
        rest = ".".join([RESNET[rest.rpartition(".")[0]], kind])
        if path == "mid_block.":
            return f"middle_block.{2 * int(index)}.{rest}"
        return f"{_position(path, int(index), layers)}.0.{rest}"
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0", "middle_block.1")
    path, _, part = name.partition("attentions.")
    if part:
        index, _, rest = part.partition(".")
        return f"{_position(path, int(index), layers)}.1.{rest}"
    block = int(name.split(".")[1])
    if "downsamplers" in name:
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{kind}"
    return f"output_blocks.{(block + 1) * (layers + 1) - 1}.1.conv.{kind}"


def _position(path: str, index: int, layers: int) -> str:
    side, block, _ = path.split(".")
    if side == "down_blocks":
        return f"input_blocks.{1 + int(block) * (layers + 1) + index}"
    return f"output_blocks.{int(block) * (layers + 1) + index}"


def vae_name(name: str, ups: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{ups - 1 - int(found[1])}", name)
    name = re.sub(r"(up\.\d+)\.resnets", r"\1.block", name).replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for mine, original in ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{mine}", f"mid.attn_1.{original}")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
