"""One page, with pictures, of the committed results of the benchmarks (install ``fastac[train]``)."""

from .committed import ReportError
from .page import Built, build

__all__ = ["Built", "ReportError", "build"]
