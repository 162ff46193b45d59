"""What a figure was measured on: for the files of results, so that a reader can tell what to compare."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from ._version import __version__


def commit() -> str:
    """The commit of the checkout this runs from, "-dirty" if it was changed; outside one, the version.

    Changes of the results themselves do not count: each row is one.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment may lie in another project's checkout.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git(
            *("status", "--porcelain", "--untracked-files=no"),
            *("--", ":(top)", ":(top,exclude)benchmarks/results"),
        )
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{__version__}"


def cpu_model() -> str:
    """The processor's name; its architecture where the system tells no more."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
