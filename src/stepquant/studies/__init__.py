"""Studies: grids of models, recipes, bits and seeds, computed cell by cell in worker processes, resumable."""

from stepquant.studies.run import run_study
from stepquant.studies.spec import Cell, Study, read_study
from stepquant.studies.table import draw_figure, markdown_tables

__all__ = ["Cell", "Study", "draw_figure", "markdown_tables", "read_study", "run_study"]
