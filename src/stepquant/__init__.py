"""stepquant: quantize diffusion models, with scales per denoising step, and run them in integers.

Importing it registers the quantization method with diffusers and transformers. What calibrates (`quantize`, `train`,
`sensitivity`, `Calibration`, `recipes`) is imported at first use, so that loading and running a model does without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stepquant.config import QuantSpec
from stepquant.errors import LowQualityWarning, StepquantError
from stepquant.integrations import diffusers as diffusers_integration
from stepquant.integrations import transformers as transformers_integration
from stepquant.integrations.diffusers import StepquantConfig
from stepquant.saving import extend_pipelines, load, save
from stepquant.version import __version__

if TYPE_CHECKING:
    from stepquant import recipes
    from stepquant.api import quantize, sensitivity, train
    from stepquant.calibration.samples import Calibration
    from stepquant.custom_model import quantize_model

diffusers_integration.register()
transformers_integration.register()
extend_pipelines()

__all__ = [
    "Calibration",
    "LowQualityWarning",
    "QuantSpec",
    "StepquantConfig",
    "StepquantError",
    "__version__",
    "load",
    "quantize",
    "quantize_model",
    "recipes",
    "save",
    "sensitivity",
    "train",
]

_LAZY = {
    "Calibration": "stepquant.calibration.samples",
    "quantize": "stepquant.api",
    "quantize_model": "stepquant.custom_model",
    "sensitivity": "stepquant.api",
    "train": "stepquant.api",
}


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("stepquant.recipes")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
