"""Coverage-guided fuzzing of the checkpoint reader: `make fuzz`.

    python benchmarks/trust/fuzz_reader.py -max_total_time=60

Each input replaces a piece of one file of a small checkpoint; its hashes are then updated, so that the checks after
them are reached. Any exception but `StepquantError` is a finding; atheris keeps the input that caused it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["stepquant.checkpoint", "stepquant.layers", "stepquant.core"]):
    import stepquant
    from benchmarks.trust.damage import reseal
    from benchmarks.trust.interruption import build
    from stepquant.checkpoint.format import MANIFEST, WEIGHTS, read_manifest, verify
    from stepquant.checkpoint.read import load_denoiser
    from stepquant.errors import StepquantError
    from stepquant.loading import resolve_pipeline
    from stepquant.quiet import silence_libraries
    from stepquant.runtime import prepare

FILES = (f"unet/{WEIGHTS}", "unet/config.json", MANIFEST)


class Target:
    """Damages the files of one folder and restores them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good = {name: (folder / name).read_bytes() for name in FILES}

    def __call__(self, data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        name = FILES[provider.ConsumeIntInRange(0, len(FILES) - 1)]
        content = self.good[name]
        start = provider.ConsumeIntInRange(0, len(content))
        length = provider.ConsumeIntInRange(0, 64)
        path = self.folder / name
        path.write_bytes(content[:start] + provider.ConsumeBytes(64) + content[start + length :])
        try:
            if name != MANIFEST:
                reseal(self.folder)
            verify(self.folder, read_manifest(self.folder))
            prepare(load_denoiser(self.folder / "unet"), "reference")
        except StepquantError:
            pass
        finally:
            for changed in (name, MANIFEST):
                (self.folder / changed).write_bytes(self.good[changed])


def main() -> None:
    silence_libraries()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        build(folder / "model")
        small = stepquant.Calibration(samples=4, steps=2)
        pipeline = resolve_pipeline(str(folder / "model"))
        stepquant.quantize(pipeline, "w4a8", recipe="minmax", calibration=small).save_pretrained(folder / "saved")
        atheris.Setup(sys.argv, Target(folder / "saved"))
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
