"""How near a quantized denoiser comes to full precision, on samples that nothing was fitted to; and what to blame."""
