"""Print a constraint for each dependency of pyproject.toml: the lowest allowed version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    # torch has builds for several machines: the installed one is tested.
    if not requirement.startswith("torch>"):
        print(re.sub(r">=", "==", requirement))
