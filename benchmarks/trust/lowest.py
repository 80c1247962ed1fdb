"""Prints a constraint for each dependency of pyproject.toml: the lowest version that it allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    # torch comes in builds for one machine or another: whatever build was chosen is tested.
    if not requirement.startswith("torch>"):
        print(re.sub(r">=", "==", requirement))
