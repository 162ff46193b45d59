"""Builds the page: reads the committed results, draws the pictures, writes the HTML."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import jinja2

from . import committed, runs
from .committed import Folder, ReportError
from .gpus import gpus
from .memory import memory
from .method import method
from .plots import Album
from .roofline import roofline
from .runs import Run
from .scaling import scaling
from .speed import speed
from .suites import others, targets
from .systems import FILES, systems

PAGE = "index.html"


@dataclass(frozen=True)
class Built:
    """What `build` wrote, and what it left.

    Attributes:
        written: the page and its pictures.
        runs: the runs that are on the page.
        left_out: files of results that are not as in the last commit, relative to their folder.
        strangers: pictures in the output folder that are not of this page.
    """

    written: tuple[Path, ...]
    runs: tuple[Run, ...]
    left_out: tuple[str, ...]
    strangers: tuple[Path, ...]


def build(results: Path, output: Path) -> Built:
    """Builds the page of a folder of results.

    Args:
        results: a folder of a git work tree; only what is as in the last commit is read.
        output: a folder, made if need be, for ``index.html`` and the pictures.

    Raises:
        ReportError: nothing is committed, or a file is of another form; nothing is written then.
    """
    folder = committed.read(results)
    cpu, gpu = (_newest(folder, kind) for kind in ("cpu", "gpu"))
    if not cpu and not gpu and not set(FILES) & set(folder.committed):
        left = f"; not as in the last commit: {', '.join(folder.left_out)}" if folder.left_out else ""
        raise ReportError(f"results must hold committed results such as cpu-*.json, {results} has none{left}")
    with tempfile.TemporaryDirectory() as drawn:
        album = Album(Path(drawn), {})
        sections = [
            method(cpu, gpu),
            speed(cpu, album),
            roofline(cpu, album),
            scaling(cpu, album),
            memory(cpu, album),
            others(cpu),
            targets(cpu),
            systems(folder),
            gpus(gpu),
        ]
        files = [run.file for run in [*cpu, *gpu]]
        files += [folder.prefix + name for name in FILES if name in folder.committed]
        template = _environment().get_template("page.html")
        page = template.render(sections=sections, runs=[*cpu, *gpu], files=files)
        output.mkdir(parents=True, exist_ok=True)
        for name, path in album.files.items():
            (output / name).write_bytes(path.read_bytes())
    (output / PAGE).write_text(page, encoding="utf-8", newline="\n")
    pictures = [output / name for name in sorted(album.files)]
    strangers = sorted({*output.glob("*.png")} - {*pictures})
    return Built((output / PAGE, *pictures), (*cpu, *gpu), folder.left_out, tuple(strangers))


def _newest(folder: Folder, kind: str) -> list[Run]:
    """The newest committed run of every device of a kind."""
    names = [name for name in folder.committed if name.startswith(f"{kind}-") and name.endswith(".json")]
    return runs.newest(runs.read(folder.path / name, folder.prefix + name, kind) for name in names)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fastac.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
