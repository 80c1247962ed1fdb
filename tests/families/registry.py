"""All families, by name."""

from __future__ import annotations

from tests.families import audio, images, images_llm, images_text, video
from tests.families.family import Family

FAMILIES: dict[str, Family] = {
    **images.FAMILIES,
    **images_text.FAMILIES,
    **images_llm.FAMILIES,
    **video.FAMILIES,
    **audio.FAMILIES,
}
