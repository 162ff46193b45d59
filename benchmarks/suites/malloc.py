"""The C library as it comes: blocks over 32 MB go back to the kernel when freed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import machine
from ..measure import Options
from ..records import Record

NAME = "default-malloc"
WORKLOAD_NAME = "kinetics-rgb"
PEER_NAMES = ("eager", "compile", "sdpa")


def run(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """kinetics-rgb with the C library's default malloc settings, in a process of its own."""
    if options.default_malloc:  # this is that process
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "benchmarks", "--default-malloc", "--suite", "speed",
            "--workload", WORKLOAD_NAME, "--peers", ",".join(p for p in PEER_NAMES if p in options.peers),
            "--rounds", str(min(options.rounds, 10)), "--threads", str(options.threads),
            "--backend", options.backend, "--divide-batch", str(options.divide_batch), "--output", folder,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the run with default malloc settings failed:\n{done.stderr}")
        found = json.loads(next(Path(folder).glob("*.json")).read_text())
    for name, lines in found["errors"].items():
        errors[name.replace("speed", NAME, 1)] = lines
    for one in found["records"]:
        yield one | {"suite": NAME}
