"""The section on cost by size, with the fitted exponents."""

from __future__ import annotations

import math

from . import plots
from .content import NONE, Block, Column, Folded, Pictures, Section, Table, Text, missing, size, sizes
from .parts import per_run, workloads
from .plots import Album
from .runs import Run

SWEPT = {"B": "batch", "L": "length", "M": "in_features", "N": "cluster_size"}


def scaling(runs: list[Run], album: Album) -> Section:
    """Cost by size, with the fitted exponents."""
    section = Section("scaling", "Scaling in B, L, M and N")
    section.blocks.append(
        Text(
            "One size is varied, the others stay. Cost should grow no faster than the size: an exponent of "
            "1. The exponents are least squares of the logarithms over the sizes in the stated range, with a "
            "95 % interval."
        )
    )
    return per_run(section, runs, lambda run: _scaling(run, album))


def _scaling(run: Run, album: Album) -> list[Block]:
    frame = run.suite("sweep")
    blocks: list[Block] = []
    pictures = []
    for symbol, column in SWEPT.items():
        of_symbol = frame[frame["varied"] == symbol]
        if of_symbol.empty:
            blocks.append(missing(f"Scaling in {symbol}"))
        for workload in workloads(of_symbol["workload"]):
            rows = of_symbol[of_symbol["workload"] == workload]
            panels = {}
            for label, quantity, scale in (("ms", "median_s", 1e3), ("peak memory, MB", "peak_bytes", 1e-6)):
                some = rows[rows[quantity] > 0]
                if not some.empty:
                    panels[label] = some.assign(size=some[column], value=some[quantity] * scale)
            if not panels:
                blocks.append(missing(f"Scaling in {symbol}, {workload}"))
                continue
            fixed = rows.iloc[0].drop(column).reindex(rows.columns)
            if symbol == "B":
                fixed["full_batch"] = math.nan
            title = f"{workload}: {symbol} varied, {sizes(fixed)}"
            found = next(iter(panels.values()))["size"]
            with plots.style():
                pictures.append(
                    album.save(
                        plots.scaling(title, symbol, panels),
                        run,
                        f"scaling-{symbol.lower()}-{plots.slug(workload)}",
                        f"Cost against {symbol}: {title}.",
                        f"Lines of {' and of '.join(panels)} against {symbol} from {size(found.min())} to "
                        f"{size(found.max())}, logarithmic both ways.",
                    )
                )
    reasons = frame[(frame["reason"] != "") & frame["median_s"].isna() & frame["peak_bytes"].isna()]
    if pictures:
        blocks.append(Pictures(pictures))
    if (frame["peak_bytes"] <= 0).any():
        blocks.append(Text("A peak that is too small to be seen has no point."))
    if len(reasons):
        lines = dict.fromkeys(
            f"{r['workload']}: no figure of {r['contender']}, {r['mode']}, at {r['varied']} = "
            f"{size(r[SWEPT[r['varied']]]) if r['varied'] in SWEPT else NONE}: {r['reason']}"
            for _, r in reasons.iterrows()
        )
        blocks.append(Folded("Sizes without a figure", [Text(line) for line in lines]))
    return [*blocks, _exponents(run)]


def _exponents(run: Run) -> Table | Text:
    found = run.content["exponents"]
    if not found:
        return missing("Exponents")
    heads = ("mode", "contender", "quantity", "exponent", "95 % interval", "fitted over", "sizes")
    columns = [Column(name, is_text=name in ("contender", "quantity")) for name in heads]
    table = Table("Fitted exponents", run.source, columns, group="varied")
    for e in found:
        table.add(
            [
                str(e["mode"]),
                str(e["contender"]),
                str(e["quantity"]),
                _fixed(e["exponent"]),
                _interval(e["low"], e["high"]),
                f"{size(e['from'])} to {size(e['to'])}",
                size(e["points"]),
            ],
            f"{e['varied']} ({e['workload']})",
        )
    return table


def _interval(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{_fixed(low)} to {_fixed(high)}"


def _fixed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
