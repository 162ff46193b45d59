"""``fastac report``."""

from __future__ import annotations

from pathlib import Path

import click

from fastac.report import ReportError, build

from . import common


@click.command("report")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results"),
    show_default=True,
    help="Folder of results in a git work tree.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("docs/benchmarks"),
    show_default=True,
    help="Folder of the page and its pictures.",
)
def command(results: Path, output: Path) -> None:
    """Build the page of the benchmarks from committed results.

    The newest run of every processor and GPU, made by make bench and make gpu, and the tables of the
    experiments become index.html with pictures beside it. What is untracked or differs from the last
    commit is left out, and named. What was not measured is said to be so. The same results give the same
    files.

    \b
    fastac report
    fastac report --results benchmarks/results --output docs/benchmarks
    """
    common.check_writable(output, "--output")
    with common.user_errors(ReportError), common.os_errors_at(output):
        built = build(results, output)
    for name in built.left_out:
        click.echo(f"left out, not as in the last commit: {name}", err=True)
    for path in built.strangers:
        click.echo(f"not of this page: {path}", err=True)
    for run in built.runs:
        click.echo(f"read: {run.file}: {run.source}")
    page, *pictures = built.written
    click.echo(f"page: {page}, with {len(pictures)} pictures")
