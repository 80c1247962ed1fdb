"""Duration of a quantization, in a file beside the checkpoint, whose bytes depend on its inputs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from stepquant.errors import StepquantError
from stepquant.report.files import read_file

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Times(BaseModel):
    """Contents of the file of ``stepquant quantize --times``.

    Attributes:
        out: name of the checkpoint folder.
        seconds: duration of the run; of a resumed run, since the resumption.
        stages: seconds of each stage, in order.
        threads: CPU threads.
    """

    model_config = ConfigDict(frozen=True)

    out: str
    seconds: Seconds
    stages: dict[str, Seconds]
    threads: int


def read_times(path: Path, folder: Path) -> Times:
    """Read a file of ``stepquant quantize --times`` about `folder`.

    Raises:
        StepquantError: if it cannot be read, is not valid, or is about another folder.
    """
    times = read_file(path, Times, "times file", "file that stepquant quantize --times wrote")
    if times.out != folder.resolve().name:
        raise StepquantError(f"{path} is about {times.out}; expected the file of {folder}.")
    return times
