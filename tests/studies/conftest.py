from __future__ import annotations

from pathlib import Path

import pytest

RECIPES = """
import os, time
from stepquant.recipes import MinMax, Recipe

class Fine(MinMax):
    pass

class Raising(Recipe):
    def stages(self):
        raise ValueError("out of luck")

class Dying(Recipe):
    def stages(self):
        os._exit(7)

class Sleeping(Recipe):
    def stages(self):
        print("asleep", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def write_study(tmp_path, unconditional_folder):
    """Writes a study of the small unconditional model with the given recipes; returns its path."""
    own = tmp_path / "own.py"
    own.write_text(RECIPES)

    def write(recipes: str, *, seeds: str = "[0]", bits: str = '["w8a8"]') -> Path:
        path = tmp_path / "studies" / "small.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'models = ["{unconditional_folder}"]\nbits = {bits}\nseeds = {seeds}\n'
            "[evaluation]\ncount = 3\nsteps = 2\n[calibration]\nsamples = 4\nsteps = 2\n"
            f"[recipes]\n{recipes.replace('OWN', str(own))}\n"
        )
        return path

    return write
