"""Command line of the comparison: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import machine

QUICK = ["kinetics-rgb", "online"]


def arguments() -> argparse.ArgumentParser:
    from .peers import PEERS
    from .workloads import WORKLOADS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times the operator against plain torch, torch.compile and SDPA; saves the table.",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{' and '.join(QUICK)} only, few rounds, no extras"
    )
    parser.add_argument(
        "--workload", action="append", choices=list(WORKLOADS), help="may be given several times"
    )
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
        "--default-malloc", action="store_true", help="keep the C library's default malloc settings"
    )
    parser.add_argument(
        "--no-extras", action="store_true", help="no bfloat16, workspace and default-malloc figures"
    )
    parser.add_argument(
        "--output", type=Path, default=machine.ROOT / "benchmarks" / "results", help="folder to save in"
    )
    return parser


def main() -> int:
    parser = arguments()
    given = parser.parse_args()
    machine.reexecute(given.default_malloc)

    from . import compare, correctness
    from .peers import PEERS
    from .workloads import WORKLOADS

    peers = [name for name in given.peers.split(",") if name]
    for name in peers:
        if name not in PEERS:
            parser.error(f"--peers: {name!r} is not one of {', '.join(PEERS)}")
    for name in ("threads", "divide_batch", "rounds"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    options = compare.Options(
        workloads=given.workload or (QUICK if given.quick else list(WORKLOADS)),
        peers=peers,
        rounds=given.rounds or (7 if given.quick else 30),
        budget=2.0 if given.quick else 5.0,
        threads=given.threads,
        backend=given.backend,
        divide_batch=given.divide_batch,
        extras=not (given.quick or given.no_extras),
        default_malloc=given.default_malloc,
    )
    try:
        report = compare.run(options)
    except correctness.Red as wrong:
        print(f"WRONG RESULT, no speed is reported: {wrong}", file=sys.stderr)
        return 1
    print(compare.render(report, peers))
    for path in compare.save(report, given.output):
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
