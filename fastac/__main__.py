"""The command line: `python -m fastac info` and `python -m fastac demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastac", description="Fused attention clusters for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, native library, backends, limits, environment variables")
    commands.add_parser("demo", help="train an attention cluster on Flash-MNIST", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        return _demo(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from . import info

    print(info.report())
    return 0


def _demo(arguments: Sequence[str]) -> int:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        print(f'the demo needs {error.name}: pip install "fastac[demo]"', file=sys.stderr)
        return 1
    return demo.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
