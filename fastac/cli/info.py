"""``fastac info``."""

from __future__ import annotations

import click


@click.command("info")
def command() -> None:
    """Versions, native library, backends, limits and environment variables."""
    from fastac import info

    from . import common

    with common.user_errors(), common.os_errors_at("standard output"):
        click.echo(info.report())
