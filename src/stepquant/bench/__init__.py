"""Latency of a quantized denoiser on this machine, beside full precision and other libraries."""
