"""Arithmetic of quantization: tensors in, tensors out; no modules, no files."""
