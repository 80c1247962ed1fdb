"""Quantized layers, and the clock that provides the denoising step. Importing it registers all kinds of layers."""

from stepquant.layers import conv, linear

__all__ = ["conv", "linear"]
