"""Keep other libraries' notices and bars off standard error."""

from __future__ import annotations

import warnings

import diffusers
import transformers


def silence_libraries() -> None:
    """For a process whose standard error is for people: the command's, and a study's workers."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore")
