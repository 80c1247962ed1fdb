"""Integration with diffusers: load models written by stepquant, and quantize weights while loading.

    pipe = DiffusionPipeline.from_pretrained("model-w4a8")                       # a folder that stepquant wrote
    unet = UNet2DConditionModel.from_pretrained("model-w4a8", subfolder="unet")
    unet = UNet2DConditionModel.from_pretrained("model", subfolder="unet", quantization_config=StepquantConfig("w8a16"))

``import stepquant`` registers two classes with diffusers, under ``quant_method: stepquant``, and changes nothing else.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from packaging.version import Version
from torch import Tensor, nn

from stepquant.checkpoint.format import DIGEST, FORMAT_VERSION, QUANT_METHOD
from stepquant.checkpoint.read import check_names, check_tables, check_tensor, verify_component
from stepquant.checkpoint.upgrade import expect_version, upgrade_config, upgrade_model
from stepquant.checkpoint.write import narrow_tensors
from stepquant.config import FLOAT_BITS, QuantSpec
from stepquant.errors import StepquantError
from stepquant.files import tensors_digest
from stepquant.integrations.weight_only import quantize_weights
from stepquant.layers.install import install_empty, made_by_quantization
from stepquant.runtime import Backend, prepare

OLDEST = "0.40"
"""First version of diffusers that passes file names and tensors to a quantizer."""
NEEDED = ("maybe_update_loaded_keys", "maybe_update_state_dict", "update_missing_keys", "create_quantized_param")


def check_diffusers(version: str = diffusers.__version__, base: type = DiffusersQuantizer) -> None:
    """Raise `StepquantError` if this version of diffusers cannot load quantized components."""
    if Version(version) < Version(OLDEST):
        raise StepquantError(
            f"diffusers {version} is too old to load quantized components: install diffusers {OLDEST} or newer, or "
            "load the folder with stepquant.load."
        )
    if not all(hasattr(base, name) for name in NEEDED):
        raise StepquantError(
            f"diffusers {version} is newer than this stepquant knows, and loads models in another way: upgrade "
            "stepquant, or load the folder with stepquant.load."
        )


class _Method(StrEnum):
    """Quantization method as an enumeration, which diffusers requires."""

    STEPQUANT = QUANT_METHOD


class StepquantConfig(QuantizationConfigMixin):
    """Configuration of a component that stepquant has quantized, or quantizes while it is loaded.

    Args:
        bits: bits of weights, with activations in floating point: ``"w8a16"``, ``"w4a16"``. To quantize activations,
            use `stepquant.quantize`, which calibrates them on samples.
        spec: a `QuantSpec` or its dictionary instead of `bits`, for overrides and groups.
        backend: the runtime, one of ``stepquant.runtime.BACKENDS`` or a custom function.
        structure, format_version, provenance: values from the ``config.json`` of a component that is already quantized.

    Raises:
        StepquantError: for bits that need calibration, or a configuration written by a newer stepquant.
    """

    def __init__(
        self,
        bits: str | None = None,
        *,
        spec: QuantSpec | dict[str, Any] | None = None,
        backend: Backend = "auto",
        structure: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        provenance: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        check_diffusers()
        if unknown or quant_method != QUANT_METHOD:
            raise StepquantError(f"quantization_config has {sorted(unknown) or quant_method!r}, which is unknown here.")
        if (bits is None) == (spec is None):
            raise StepquantError("StepquantConfig takes either bits, such as 'w8a16', or a spec.")
        given: dict[str, Any] = {"spec": bits if spec is None else spec, "structure": structure}
        given |= {"format_version": format_version, "provenance": provenance}
        given, self.stored_version = upgrade_config(given, "the configuration of the quantized component")
        self.quant_method, self.format_version = _Method.STEPQUANT, FORMAT_VERSION
        self.spec = QuantSpec.parse(given["spec"])
        self.backend, self.structure, self.provenance = backend, given["structure"], given["provenance"]
        if structure is None and (self.spec.default_bits.activation != FLOAT_BITS or self.spec.default_bits.is_float):
            raise StepquantError(
                f"bits {self.spec} are not available while loading: activations need samples to be calibrated on. "
                "Give w8a16 or w4a16, or quantize the pipeline with stepquant.quantize."
            )

    def to_dict(self) -> dict[str, Any]:
        """Serialize for ``config.json``."""
        described: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "spec": self.spec.model_dump(mode="json"),
            "structure": self.structure,
        }
        return described | ({} if self.provenance is None else {"provenance": self.provenance})

    def to_diff_dict(self) -> dict[str, Any]:
        """Configuration without the structure, which has an entry per layer; diffusers prints it."""
        return {name: value for name, value in self.to_dict().items() if name != "structure"}


class StepquantQuantizer(DiffusersQuantizer):
    """Quantizer of `ModelMixin.from_pretrained`: verifies files, replaces and fills layers, and installs kernels.

    The component gets the checks of `stepquant.load`. Without a ``stepquant.json`` (downloads of one component, or
    models that diffusers saved) only the digest in the weight file is checked, if it has one.
    """

    requires_calibration = False
    quantization_config: StepquantConfig

    def __init__(self, quantization_config: StepquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._path = Path()
        self._expected: dict[str, Tensor] = {}
        self._made: tuple[str, ...] = ()

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32 if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Verify the files, before any tensor is used."""
        if self.pre_quantized:
            self._path = Path(checkpoint_files[0])
            verify_component([Path(file) for file in checkpoint_files])
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        install_empty(model, self.quantization_config.structure or {}, device="meta")
        expect_version(model, self.quantization_config.stored_version)
        self._made = made_by_quantization(model)
        self._expected = dict(model.state_dict())

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized and missing_keys:
            check_names(self._path, set(self._expected) - set(missing_keys), set(self._expected))
        return missing_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check the tensors of one file."""
        if not self.pre_quantized:
            return state_dict
        check_names(self._path, set(state_dict), set(self._expected) & set(state_dict))
        return {
            name: check_tensor(self._path, name, tensor, self._expected[name]) for name, tensor in state_dict.items()
        }

    def check_if_quantized_param(self, model: Any, param_value: Tensor, param_name: str, *_: Any, **__: Any) -> bool:
        return self.pre_quantized and param_name.startswith(self._made)

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        *_: Any,
        **__: Any,
    ) -> None:
        """Take codes and tables from the file; `param_value` is already rounded to ``torch_dtype``."""
        value = state_dict[param_name].clone()  # not a view of the mapped file
        set_module_tensor_to_device(model, param_name, target_device, value=value, dtype=value.dtype)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for `save_pretrained`, the same as in a folder written by stepquant."""
        if not safe_serialization:
            raise StepquantError(
                "a quantized model is written as safetensors only: leave out safe_serialization=False."
            )
        tensors = narrow_tensors(state_dict, self._made)
        return tensors, {DIGEST: tensors_digest(tensors)}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if self.pre_quantized:
            upgrade_model(model, config.stored_version)
            check_tables(model)
        else:
            config.structure = quantize_weights(model, config.spec)
            self._made = made_by_quantization(model)
        model.register_to_config(quantization_config=config.to_dict())  # type: ignore[operator]
        prepare(model, config.backend)
        return model.requires_grad_(False)


def register() -> None:
    """Register both classes with diffusers; idempotent."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = StepquantQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = StepquantConfig
