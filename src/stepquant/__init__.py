"""stepquant: quantize diffusion models step by step and run them in integers."""

from stepquant import diffusers_quantizer, transformers_quantizer
from stepquant.api import quantize, sensitivity, train
from stepquant.calibration.trajectories import Calibration
from stepquant.config import QuantSpec
from stepquant.diffusers_quantizer import StepquantConfig
from stepquant.errors import StepquantError
from stepquant.saving import load, save
from stepquant.version import __version__

diffusers_quantizer.register()
transformers_quantizer.register()

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
