"""How fast a quantized denoiser is on this machine, beside full precision and other libraries."""
