"""Quantized denoisers for other runtimes."""
