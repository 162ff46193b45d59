"""The authoritative comparison: the chosen suites one after the other, in one process."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import asdict

import torch

from . import correctness, machine, sweeps, targets
from .measure import Options, make_contenders, say
from .records import Report
from .suites import SUITES, SWEEP
from .workloads import WORKLOADS

__all__ = ["Options", "Unfinished", "run"]


class Unfinished(Exception):
    """A suite failed or was interrupted, which is the cause; `report` has the records from before."""

    def __init__(self, suite: str, report: Report) -> None:
        super().__init__(f"suite {suite} did not finish")
        self.report = report


def run(options: Options) -> Report:
    """Measure.

    Raises:
        correctness.Red: before any figure of a workload whose results are wrong.
        Unfinished: anything else went wrong, or Ctrl-C.
    """
    torch.set_num_threads(options.threads)
    if not options.default_malloc:
        machine.prime()
    report = Report(
        machine.describe(options.backend),
        asdict(options),
        {
            name: {"note": contender.note, "computes": contender.computes}
            for name, contender in make_contenders(options).items()
        },
    )
    for name in options.suites:
        begin = time.perf_counter()
        say(f"== {name}")
        try:
            if name == SWEEP:
                records, exponents = sweeps.run(options)
                report.records += records
                report.exponents += exponents
            else:
                report.records += SUITES[name](options, report.errors)
        except correctness.Red:
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise Unfinished(name, report) from error
        gc.collect()
        say(f"== {name} took {time.perf_counter() - begin:.0f} s")
    report.machine["load_average_at_end"] = round(os.getloadavg()[0], 2)
    isa = str(report.machine["isa"])
    report.targets = targets.figures(report.records, WORKLOADS, isa=isa, threads=options.threads)
    report.targets += sweeps.figures(report.exponents)
    return report
