"""Check every finished quantization on samples that nothing was fitted to."""

from stepquant.check.result import OnLowQuality

__all__ = ["OnLowQuality"]
