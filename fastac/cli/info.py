"""``fastac info``."""

from __future__ import annotations

import click


@click.command("info")
def command() -> None:
    """Versions, native library, backends, limits and environment variables."""
    from fastac import info

    click.echo(info.report())
