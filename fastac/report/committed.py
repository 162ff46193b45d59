"""Which files of a folder are as the last commit has them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


class ReportError(Exception):
    """No page can be made of these results; the message is one line that a user can act on."""


@dataclass(frozen=True)
class Folder:
    """A folder in a git work tree.

    Attributes:
        path: the folder.
        prefix: its path in the work tree, with a slash at its end unless it is the top.
        committed: names of the files in it, folders below left out, that are as in the last commit.
        left_out: the files in it and below that are not, deleted ones included; relative to the folder.
    """

    path: Path
    prefix: str
    committed: tuple[str, ...]
    left_out: tuple[str, ...]


def read(path: Path) -> Folder:
    """Compares a folder with the last commit.

    Raises:
        ReportError: it is no folder of a git work tree, or git is not there.
    """
    if not path.is_dir():
        raise ReportError(f"results must be a folder, got {path}")
    try:
        inside = _git(path, "rev-parse", "--is-inside-work-tree").strip() == b"true"
    except subprocess.CalledProcessError:
        inside = False
    except OSError as error:
        raise ReportError(f"git is needed to tell which results are committed: {error}") from error
    if not inside:
        raise ReportError(f"results must lie in a git work tree, got {path}")
    prefix = os.fsdecode(_git(path, "rev-parse", "--show-prefix")).rstrip("\n")
    in_commit = _blobs(path)
    on_disk = sorted(
        name
        for file in path.rglob("*")
        if file.is_file() and not (name := file.relative_to(path).as_posix()).startswith(".git/")
    )
    known = [name for name in on_disk if name in in_commit]
    # With the path, so that git applies the conversions of line ends of adding the file.
    hashes = _git(path, "hash-object", "--", *known).decode().split() if known else []
    same = {name for name, blob in zip(known, hashes, strict=True) if in_commit[name] == blob}
    return Folder(
        path,
        prefix,
        tuple(sorted(name for name in same if "/" not in name)),
        tuple(sorted({*on_disk, *in_commit} - same)),
    )


def _blobs(path: Path) -> dict[str, str]:
    """By name, the object of every file of the folder in the last commit; none without a commit."""
    try:
        listed = _git(path, "ls-tree", "-r", "-z", "HEAD", ".")
    except subprocess.CalledProcessError:
        return {}
    found = {}
    for entry in filter(None, listed.split(b"\0")):
        meta, _, name = entry.partition(b"\t")
        found[os.fsdecode(name)] = meta.split()[2].decode()
    return found


def _git(path: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(path), *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout
