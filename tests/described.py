"""Description of a small UNet or DiT by one call with random arguments."""

from __future__ import annotations

from typing import Any

import torch

from stepquant.models import ModelDescription, describe


def example_call(model: Any) -> dict[str, Any]:
    """Arguments of one call of a `UNet2DModel`, `UNet2DConditionModel` or `DiTTransformer2DModel`."""
    config = model.config
    sample = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, dtype=model.dtype)
    time = torch.tensor([500])
    if "num_embeds_ada_norm" in config:
        return {"hidden_states": sample, "timestep": time, "class_labels": torch.tensor([1])}
    arguments = {"sample": sample, "timestep": time}
    if "cross_attention_dim" in config:
        arguments["encoder_hidden_states"] = torch.randn(1, 7, config.cross_attention_dim, dtype=model.dtype)
    return arguments


def described(model: Any) -> ModelDescription:
    with torch.random.fork_rng(devices=[]):
        return describe(model, example_call(model))
