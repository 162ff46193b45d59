"""What is wrong with a user's data, entry by entry: collected, listed, written to a file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One broken entry of a data set; ``str()`` of it is one line.

    Attributes:
        video: its name, or "" where the entry has none.
        modality: the modality concerned, or None if it is the whole video or a line of a CSV file.
        what: the kind of problem in a few words, such as "unreadable" or "wrong dimension".
        found: what was there instead of what must be.
        where: the file, HDF5 path or line, or "".
    """

    video: str
    modality: str | None
    what: str
    found: str
    where: str = ""

    def __str__(self) -> str:
        name = " ".join(filter(None, (self.video, self.modality and f"[{self.modality}]")))
        text = ": ".join(filter(None, (name, self.what, self.found)))
        text = f"{text} ({self.where})" if self.where else text
        return " ".join(text.split())


class DataProblemsError(ValueError):
    """Data that cannot be used as they are.

    Attributes:
        problems: all of them; the message lists them, too.
        modalities: M by name, as far as the data told it.
    """

    def __init__(
        self, message: str, problems: Sequence[Problem] = (), modalities: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.problems = list(problems)
        self.modalities = dict(modalities or {})


def listing(problems: Sequence[Problem]) -> str:
    """One indented line per problem."""
    return "\n".join(f"  {problem}" for problem in problems)


def write_problems(problems: Sequence[Problem], path: str | os.PathLike[str]) -> None:
    """Writes all problems to a CSV file with the columns video, modality, what, found, where."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "modality", "what", "found", "where"])
        writer.writerows([p.video, p.modality or "", p.what, p.found, p.where] for p in problems)
