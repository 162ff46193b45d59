"""The command line, `fastac` or `python -m fastac`: one module per command, imported when it is called."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from fastac._version import __version__

COMMANDS = {
    "train": "train a classifier on your own features",
    "eval": "evaluate a trained classifier",
    "predict": "name the classes of videos",
    "show": "draw what a classifier's attention units look at",
    "flash-mnist": "the paper's experiment on digits in noise, one cell of its Table 1 or all",
    "compare": "attention cluster, bi-LSTM, pyramid and poolings on Flash-MNIST, in one table",
    "demo": "a small Flash-MNIST in a few minutes, beside plain torch",
    "report": "a page, with pictures, of the committed benchmarks",
    "info": "versions, backends, limits, environment variables",
}
MODULES = {"eval": "evaluate", "flash-mnist": "flash_mnist"}

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class Commands(click.Group):
    """Imports a command's module when the command is called: most need more than the package itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        try:
            module = importlib.import_module(f"fastac.cli.{MODULES.get(cmd_name, cmd_name)}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "fastac":
                raise
            raise click.ClickException(
                f"fastac {cmd_name} needs {error.name}: pip install 'fastac[train]'"
            ) from error
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments begin with; names all commands where there is none such."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"the command must be one of {', '.join(COMMANDS)}, got {args[0]!r}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastac")
def group() -> None:
    """Fused attention clusters for PyTorch: train, evaluate, look.

    fastac COMMAND --help explains a command.

    Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 130
    interrupted. With FASTAC_TRACEBACK=1 a failure shows its traceback.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        with logging_to_stderr():
            status = group.main(argv, prog_name="fastac", standalone_mode=False)
    except click.Abort as error:
        if isinstance(error.__cause__, EOFError):  # click takes one for the end of the user's input
            raise error.__cause__ from None
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        if os.environ.get("FASTAC_TRACEBACK") == "1":
            traceback.print_exception(error)
        error.show()
        return error.exit_code
    return status if isinstance(status, int) else 0


class _StderrHandler(logging.Handler):
    """Writes to what standard error is at the moment, above a progress bar if one is there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        text = self.format(record)
        bars = sys.modules.get("tqdm")
        if bars is None:
            click.echo(text, err=True)
        else:
            bars.tqdm.write(text, file=sys.stderr)


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """The package's log goes to standard error; afterwards it goes where it went, for callers in Python."""
    logger = logging.getLogger("fastac")
    before = logger.level, logger.propagate
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    # Which backend computes is for `fastac info` and `fastac.explain` to say, unless something is wrong.
    handler.addFilter(lambda record: record.module != "backends" or record.levelno > logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
