"""Suppress messages and progress bars of other libraries."""

from __future__ import annotations

import warnings

import diffusers
import transformers


def silence_libraries() -> None:
    """Suppress them in this process: for the command line and the workers of a study."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore")
