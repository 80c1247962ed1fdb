"""Reading of files that other commands wrote for a report."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from stepquant.errors import StepquantError

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_file(path: Path, kind: type[ModelT], what: str, expected: str) -> ModelT:
    """Read and validate a JSON file.

    Args:
        what: kind of file for error messages, such as ``"times file"``.
        expected: description of a valid file.

    Raises:
        StepquantError: if it cannot be read or is not valid.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"{what} {path} cannot be read: {error}.") from None
    except ValidationError:
        raise StepquantError(f"{path} is not valid; expected a {expected}.") from None
