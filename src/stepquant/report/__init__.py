"""One page about a quantized model: what was done, what it costs, what it changed. Self-contained HTML."""

from stepquant.report.content import Report, gather, origin_of
from stepquant.report.page import render, write

__all__ = ["Report", "gather", "origin_of", "render", "write"]
