"""Files that other commands wrote for a report, checked at the door."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from stepquant.errors import StepquantError

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_file(path: Path, kind: type[ModelT], what: str, expected: str) -> ModelT:
    """The contents of `path`.

    Args:
        what: names the file in a sentence, such as ``"times file"``; expected: what it should have been.

    Raises:
        StepquantError: if it cannot be read, or is something else.
    """
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"{what} {path} cannot be read: {error}.") from None
    except ValidationError:
        raise StepquantError(f"{path} is no {expected}.") from None
