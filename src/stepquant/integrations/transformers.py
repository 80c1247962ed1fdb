"""Integration with transformers: load and save text encoders whose weights are quantized.

    pipe = DiffusionPipeline.from_pretrained("model")           # with text_encoder/ written by stepquant
    text_encoder = CLIPTextModel.from_pretrained("model", subfolder="text_encoder")

Method and configuration are those of `stepquant.integrations.diffusers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from stepquant.checkpoint.format import DIGEST, QUANT_METHOD
from stepquant.checkpoint.read import check_names, check_tensor, verify_component
from stepquant.checkpoint.upgrade import expect_version, upgrade_model
from stepquant.checkpoint.write import narrow_tensors
from stepquant.files import tensors_digest
from stepquant.integrations.diffusers import StepquantConfig
from stepquant.integrations.weight_only import quantize_weights
from stepquant.layers.install import install_empty, made_by_quantization
from stepquant.layers.quantized import quantized_modules
from stepquant.runtime import prepare


class StepquantHfQuantizer(HfQuantizer):
    """Quantizer of `PreTrainedModel.from_pretrained`; see `StepquantQuantizer`."""

    requires_calibration = False
    quantization_config: StepquantConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Verify the files and install empty layers, whose scales keep their dtype."""
        if not self.pre_quantized:
            return
        files = [Path(file) for file in checkpoint_files or ()]
        verify_component(files)
        install_empty(model, self.quantization_config.structure or {}, device="meta")
        expect_version(model, self.quantization_config.stored_version)
        made = made_by_quantization(model)
        expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(made)}
        found: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name.startswith(made):
                        found[name] = path
                        check_tensor(path, name, file.get_tensor(name), expected.get(name, file.get_tensor(name)))
        # transformers initializes missing tensors and ignores unexpected ones.
        check_names(files[0], set(found), set(expected))
        for name in quantized_modules(model):
            # Otherwise its class would initialize the weights of its layers if another tensor is missing.
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        if self.pre_quantized:
            upgrade_model(model, config.stored_version)
        else:
            config.structure = quantize_weights(model, config.spec)
        prepare(model, config.backend)
        return model.requires_grad_(False)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors for `save_pretrained`, and the digest as metadata."""
        tied = set(getattr(model, "all_tied_weights_keys", ()))
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        tensors = narrow_tensors(state, made_by_quantization(model))
        return tensors, {DIGEST: tensors_digest(tensors)}


def register() -> None:
    """Register quantizer and configuration with transformers; idempotent."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = StepquantHfQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = StepquantConfig
