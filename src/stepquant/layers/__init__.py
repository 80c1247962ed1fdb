"""Quantized layers, and the clock that tells them the denoising step. Importing it registers every kind of layer."""

from stepquant.layers import conv, linear

__all__ = ["conv", "linear"]
