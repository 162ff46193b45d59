"""Command line of the comparison: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from . import machine

QUICK = {"workloads": ["kinetics-rgb", "online"], "suites": ["speed", "overhead"]}


def arguments() -> argparse.ArgumentParser:
    from .peers import PEERS
    from .suites import notes
    from .workloads import WORKLOADS

    known = notes()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times the operator beside its peers, correctness first; prints and saves the records.",
        epilog="suites:\n" + "\n".join(f"  {name:15} {note}" for name, note in known.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true",
        help=f"{' and '.join(QUICK['workloads'])} only, few rounds, suites {' and '.join(QUICK['suites'])}",
    )  # fmt: skip
    parser.add_argument(
        "--suite", action="append", choices=list(known), help="may be given several times (default all)"
    )
    parser.add_argument(
        "--workload", action="append", choices=list(WORKLOADS),
        help="of speed and memory; may be given several times (default all)",
    )  # fmt: skip
    parser.add_argument(
        "--peers", default=",".join(PEERS), help=f"comma-separated, of {', '.join(PEERS)}; may be empty"
    )
    parser.add_argument(
        "--rounds", type=int, help="at most this many rounds per workload and mode (default 30)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--backend", default="cpu", help="backend measured as ours (default cpu)")
    parser.add_argument(
        "--divide-batch", type=int, default=1, metavar="K", help="divide every B by K; the table says so"
    )
    parser.add_argument(
        "--tuning", type=float, default=300.0, metavar="SECONDS",
        help="what max-autotune may compile for in all (default 300)",
    )  # fmt: skip
    parser.add_argument(
        "--default-malloc", action="store_true", help="keep the C library's default malloc settings"
    )
    parser.add_argument(
        "--output", type=Path, default=machine.ROOT / "benchmarks" / "results", help="folder to save in"
    )
    return parser


def main() -> int:
    parser = arguments()
    given = parser.parse_args()
    machine.reexecute(given.default_malloc)

    from . import compare, correctness, tables
    from .peers import PEERS
    from .records import save
    from .suites import notes
    from .workloads import WORKLOADS

    peers = [name for name in given.peers.split(",") if name]
    for name in peers:
        if name not in PEERS:
            parser.error(f"--peers: {name!r} is not one of {', '.join(PEERS)}")
    for name in ("threads", "divide_batch", "rounds"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if not given.tuning >= 0:
        parser.error(f"--tuning must be at least 0, got {given.tuning}")
    options = compare.Options(
        workloads=given.workload or (QUICK["workloads"] if given.quick else list(WORKLOADS)),
        peers=list(dict.fromkeys(peers)),
        suites=list(dict.fromkeys(given.suite or (QUICK["suites"] if given.quick else notes()))),
        rounds=given.rounds or (7 if given.quick else 30),
        budget=2.0 if given.quick else 3.0,
        threads=given.threads,
        backend=given.backend,
        divide_batch=given.divide_batch,
        default_malloc=given.default_malloc,
        tuning=given.tuning,
    )
    try:
        report = compare.run(options)
    except correctness.Red as wrong:
        print(f"WRONG RESULT, no speed is reported: {wrong}", file=sys.stderr)
        return 1
    except compare.Unfinished as end:
        folder = Path(tempfile.mkdtemp(prefix="fastac-benchmarks-"))
        save(end.report, folder)
        print(f"{end}; the records from before are in {folder}", file=sys.stderr)
        if isinstance(end.__cause__, KeyboardInterrupt):
            return 130
        raise
    print(tables.render(report))
    for path in save(report, given.output):
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
