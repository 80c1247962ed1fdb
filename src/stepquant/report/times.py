"""How long quantizing took, in a file beside the checkpoint, which is the same bytes for the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from stepquant.errors import StepquantError
from stepquant.report.files import read_file

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Times(BaseModel):
    """What ``stepquant quantize --times FILE`` writes.

    Attributes:
        out: the folder it is about, by its name.
        seconds: of the whole run; of one that continued another, since then.
        stages: seconds of each stage, in order.
        threads: of the processor that took part.
    """

    model_config = ConfigDict(frozen=True)

    out: str
    seconds: Seconds
    stages: dict[str, Seconds]
    threads: int


def read_times(path: Path, folder: Path) -> Times:
    """Read a file of ``stepquant quantize --times`` about `folder`.

    Raises:
        StepquantError: if it cannot be read, is something else, or is about another folder.
    """
    times = read_file(path, Times, "times file", "file that stepquant quantize --times wrote")
    if times.out != folder.resolve().name:
        raise StepquantError(f"{path} is about {times.out}, not about {folder}: give the file of its own run.")
    return times
