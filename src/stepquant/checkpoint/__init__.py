"""Checkpoints: quantized pipelines on disk."""

from stepquant.checkpoint.format import Manifest, is_checkpoint, read_manifest
from stepquant.checkpoint.read import load_pipeline
from stepquant.checkpoint.write import check_out, save_pipeline

__all__ = ["Manifest", "check_out", "is_checkpoint", "load_pipeline", "read_manifest", "save_pipeline"]
