"""Quantized layers, activation tables, and the clock that tells them the denoising step."""
