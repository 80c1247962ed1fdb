"""Networks to time: architectures with random weights, denoisers of pipelines, and their quantized copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.calibration.model import insert_fake_quantizers
from stepquant.checkpoint.format import FORMAT_VERSION, QUANT_METHOD
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.install import install
from stepquant.layers.quantized import quantized_modules
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name, describe
from stepquant.pipelines.call import call_parameters
from stepquant.pipelines.recording import record_calls
from stepquant.pipelines.request import make_request

PREFIX = "arch:"
TOKENS = 77
"""Length of a CLIP prompt."""


def cifar_ddpm() -> UNet2DModel:
    """DDPM on CIFAR-10 (arXiv 2006.11239): 35.7 million parameters, 32x32 images."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=32,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def stable_diffusion_15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5 (arXiv 2112.10752): 860 million parameters, 64x64 latents."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def wan() -> WanTransformer3DModel:
    """The blocks of Wan 2.1 (arXiv 2503.20314), 512 channels wide and four deep: 24 million parameters."""
    return WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, text_dim=512, freq_dim=256, ffn_dim=2048, num_layers=4,
        qk_norm="rms_norm_across_heads", cross_attn_norm=True,
    )  # fmt: skip


def qwen_image() -> QwenImageTransformer2DModel:
    """The blocks of Qwen-Image (arXiv 2508.02324), 512 channels wide and four deep: 38 million parameters."""
    return QwenImageTransformer2DModel(
        num_layers=4, num_attention_heads=8, attention_head_dim=64, joint_attention_dim=512, axes_dims_rope=(16, 24, 24)
    )


def flux() -> FluxTransformer2DModel:
    """The blocks of FLUX.1, 512 channels wide, two of each kind: 24 million parameters."""
    return FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, num_attention_heads=8, attention_head_dim=64,
        joint_attention_dim=512, pooled_projection_dim=512, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cifar-ddpm": cifar_ddpm, "sd15": stable_diffusion_15, "wan": wan, "qwen-image": qwen_image, "flux": flux,
}  # fmt: skip


def find_network(name: str, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    """The full-precision denoiser of ``arch:NAME`` or of a model, and arguments of one call with `batch` samples.

    Those of a model are the first ones that its pipeline passes, without guidance where it can be turned off.

    Raises:
        StepquantError: if it does not exist or is quantized already, or its pipeline needs inputs.
    """
    if name.startswith(PREFIX):
        key = name.removeprefix(PREFIX)
        if key not in NETWORKS:
            known = ", ".join(PREFIX + known for known in NETWORKS)
            raise StepquantError(f"architecture {name!r} is unknown; expected one of {known}.")
        torch.manual_seed(0)
        model: nn.Module = NETWORKS[key]().eval()
        return model.requires_grad_(False), example(model, batch)
    pipeline = resolve_pipeline(name)
    component = denoiser_name(pipeline)
    model = getattr(pipeline, component)
    if quantized_modules(model):
        raise StepquantError(f"{name} is quantized already; expected a full-precision model, which bench quantizes.")
    guidance = 1.0 if "guidance_scale" in call_parameters(pipeline) else None
    call = record_calls(pipeline, component, make_request(pipeline, 1, guidance=guidance), range(batch), seed=0)[0]
    return model.eval().requires_grad_(False), call.arguments


def example(model: Any, batch: int) -> dict[str, Any]:
    """Random arguments of one step; those of a transformer are 1024 tokens and a prompt."""
    torch.manual_seed(0)
    if type(model) in TRANSFORMER_ARGUMENTS:
        return TRANSFORMER_ARGUMENTS[type(model)](batch)
    config = model.config
    size = config["sample_size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    sample = torch.randn(batch, config["in_channels"], height, width)
    arguments = {"sample": sample, "timestep": torch.tensor(500.0)}
    if isinstance(model, UNet2DConditionModel):
        arguments["encoder_hidden_states"] = torch.randn(batch, TOKENS, config["cross_attention_dim"])
    return arguments


def _wan_arguments(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 16, 4, 32, 32),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, TOKENS, 512),
    }


def _qwen_image_arguments(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 1024, 64),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, TOKENS, 512),
        "encoder_hidden_states_mask": torch.ones(batch, TOKENS, dtype=torch.int64),
        "img_shapes": [[(1, 32, 32)]] * batch,
    }


def _flux_arguments(batch: int) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 1024, 64),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, TOKENS, 512),
        "pooled_projections": torch.randn(batch, 512),
        "img_ids": torch.stack([torch.zeros(32, 32), rows, columns], dim=-1).flatten(0, 1),
        "txt_ids": torch.zeros(TOKENS, 3),
    }


TRANSFORMER_ARGUMENTS: dict[type, Callable[[int], dict[str, Any]]] = {
    WanTransformer3DModel: _wan_arguments,
    QwenImageTransformer2DModel: _qwen_image_arguments,
    FluxTransformer2DModel: _flux_arguments,
}


@torch.no_grad()
def quantize_network(model: nn.Module, arguments: dict[str, Any], spec: QuantSpec | str, rows: int) -> nn.Module:
    """A quantized copy without kernels, whose activation tables, if it has any, have `rows` rows.

    Ranges are the extremes on `arguments`: latency does not depend on the values of weights and scales.
    """
    timesteps = torch.linspace(0, 999, rows) if rows > 1 else None
    spec = QuantSpec.parse(spec) if isinstance(spec, str) else spec
    description = describe(model, arguments)
    calibrated = insert_fake_quantizers(model, description, spec, timesteps=timesteps, weight_range="minmax")
    points = list(calibrated.activation_points())
    for point in points:
        point.observe()
    # One observation serves every row: a table with equal rows has the latency of any table.
    calibrated.model(**arguments)
    for point in points:
        point.calibrate("minmax", per_row=False)
    result: Any = copy.deepcopy(model)
    quantization = calibrated.to_quantized()
    install(result, quantization)
    structure = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "structure": quantization.structure()}
    result.register_to_config(quantization_config=structure)
    return result


def half_arguments(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of a step on a device: tensors in bfloat16, images channels-last, the timestep unchanged."""

    def move(value: Tensor) -> Tensor:
        value = value.to(device, torch.bfloat16 if value.is_floating_point() and value.dim() > 1 else value.dtype)
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value

    moved: dict[str, Any] = pytree.tree_map_only(Tensor, move, arguments)
    return moved


def half_network(model: nn.Module, device: torch.device) -> Any:
    """A bfloat16 copy of a model on a device; integers and tables of a quantized model are unchanged."""
    return copy.deepcopy(model).to(device, torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
