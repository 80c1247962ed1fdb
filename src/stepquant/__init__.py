"""stepquant: quantize diffusion models step by step and run them in integers."""

__version__ = "0.1.0"
