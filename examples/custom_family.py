"""A custom model family: AuraFlow, text to image with joint and single transformer blocks.

python examples/custom_family.py fal/AuraFlow-v0.3 w4a8 out/auraflow
"""

from __future__ import annotations

import sys
from typing import Any

from diffusers import AuraFlowTransformer2DModel

import stepquant
from stepquant.loading import resolve_pipeline
from stepquant.models import ModelDescription, describe_blocks, register
from stepquant.models.description import numbered


def describe_auraflow(model: Any) -> ModelDescription:
    """Blocks: patches, time embedding, text projection, joint blocks, single blocks, the last modulation, the output.

    Every modulation reads the time embedding alone, so it is a time layer. The structure does not tell that, nor that
    the denoiser is given t / 1000.
    """
    joint, single = numbered(model, "joint_transformer_blocks"), numbered(model, "single_transformer_blocks")
    modulations = [f"{block}.{norm}.linear" for block in joint for norm in ("norm1", "norm1_context")]
    modulations += [f"{block}.norm1.linear" for block in single]
    middle = (joint + single)[(len(joint) + len(single)) // 2]
    return describe_blocks(
        model,
        "AuraFlow",
        ["pos_embed.proj", "time_step_proj", "context_embedder", *joint, *single, "norm_out.linear", "proj_out"],
        first="pos_embed.proj",
        last="proj_out",
        time_layers=["time_step_proj.linear_1", "time_step_proj.linear_2", *modulations, "norm_out.linear"],
        middle=middle,
        time_unit=1 / 1000,
    )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/custom_family.py MODEL BITS FOLDER")
    source, bits, folder = sys.argv[1:]
    register(AuraFlowTransformer2DModel, describe_auraflow)
    # What is saved names its layers: whoever loads it needs no description.
    stepquant.save(stepquant.quantize(resolve_pipeline(source), bits), folder)
