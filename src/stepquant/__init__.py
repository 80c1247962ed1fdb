"""stepquant: quantize diffusion models step by step and run them in integers."""

from stepquant.api import quantize, sensitivity, train
from stepquant.calibration.samples import Calibration
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.integrations import diffusers as diffusers_integration
from stepquant.integrations import transformers as transformers_integration
from stepquant.integrations.diffusers import StepquantConfig
from stepquant.saving import load, save
from stepquant.version import __version__

diffusers_integration.register()
transformers_integration.register()

__all__ = [
    "Calibration",
    "QuantSpec",
    "StepquantConfig",
    "StepquantError",
    "__version__",
    "load",
    "quantize",
    "save",
    "sensitivity",
    "train",
]
