"""All families, by name."""

from __future__ import annotations

from tests.families import images
from tests.families.family import Family

FAMILIES: dict[str, Family] = images.FAMILIES
