"""`fastac` from this checkout, whether it is installed or not."""

from __future__ import annotations

import importlib.util

from .machine import ROOT


def find_kernels() -> None:
    """Make `fastac.kernels` importable where the checkout is not installed.

    The build maps the folder `kernels` to `fastac.kernels`. Without an install, the root of the checkout is
    added to the package's own search path, where that name then leads to the folder.
    """
    import fastac

    if importlib.util.find_spec("fastac.kernels") is None:
        fastac.__path__.append(str(ROOT))
