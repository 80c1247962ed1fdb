"""``python -m stepquant.evaluation.memory MODEL BATCH BACKEND MEMORY``: print the peak memory of generation."""

from __future__ import annotations

import sys

from stepquant.loading import resolve_pipeline
from stepquant.memory import peak_resident_bytes
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.runtime.files import resolve_backend

STEPS = 2
"""The second step includes what stays allocated after the first."""


def main(model: str, batch_size: str, backend: str, memory: str) -> None:
    """Generate one batch and print the bytes."""
    pipeline = resolve_pipeline(model, resolve_backend(backend), memory)
    generate(pipeline, make_request(pipeline, STEPS), range(int(batch_size)), seed=0)
    print(peak_resident_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
