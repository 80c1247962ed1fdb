"""HTML reports about quantized models."""

from stepquant.report.content import Report, gather, origin_of
from stepquant.report.page import render, write

__all__ = ["Report", "gather", "origin_of", "render", "write"]
