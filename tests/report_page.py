"""What the tests of the page share: a repository with made-up results, and a page taken apart."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_data
from matplotlib.figure import Figure

from fastac.report.page import PAGE

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """A page taken apart: tables by caption, pictures, headings; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.open: list[tuple[str, dict[str, str]]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.headings: list[tuple[str, str]] = []
        self.tables: list[dict[str, Any]] = []
        self.loose: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        assert len(given) == len(attributes), (tag, attributes)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        if tag == "img":
            self.pictures.append(given)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((tag, ""))
        if tag == "table":
            self.tables.append({"section": self.section, "caption": "", "source": "", "rows": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")
            assert tag == "td" or given["scope"] in ("col", "row", "colgroup", "rowgroup")
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self.open.pop()
        assert opened == tag, (opened, tag, self.getpos())

    def handle_data(self, text: str) -> None:
        tags = [tag for tag, _ in self.open]
        if self.section:
            self.loose[self.section] = self.loose.get(self.section, "") + text
        if self.headings and re.fullmatch("h[1-6]", tags[-1] if tags else ""):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + text)
        if "small" in tags and "caption" in tags:
            self.tables[-1]["source"] += text
        elif "caption" in tags:
            self.tables[-1]["caption"] += text
        elif "sup" not in tags and ("td" in tags or "th" in tags):
            self.tables[-1]["rows"][-1][-1] += text

    @property
    def section(self) -> str:
        return next((given["id"] for tag, given in self.open if tag == "section"), "")

    def table(self, caption: str, section: str = "") -> dict[str, Any]:
        found = [t for t in self.tables if t["caption"].strip() == caption and section in ("", t["section"])]
        assert len(found) == 1, [t["caption"] for t in self.tables]
        return found[0]

    def row(self, caption: str, *path: str) -> list[str]:
        """The cells of the row below the group and with the name that are given, its name left out."""
        *group, name = path
        rows = self.table(caption)["rows"]
        if group:
            start = next(i for i, row in enumerate(rows) if row == group)
            rows = rows[start + 1 :]
        return next(row[1:] for row in rows if row[0] == name and len(row) > 1)


def put(folder: Path, *runs: dict[str, Any], tables: bool = True) -> Path:
    """A repository with results that are committed; returns the folder of results."""
    results = folder / "benchmarks" / "results"
    for run in runs:
        report_data.write_run(results, run, "gpu" if "gpu" in run["machine"] else "cpu")
    if tables:
        report_data.write_tables(results)
    report_data.commit_all(folder)
    return results


def page_of(output: Path) -> Page:
    return Page((output / PAGE).read_text(encoding="utf-8"))


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures become empty files, for tests that do not look at them: drawing takes most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b""))


def small_run(**machine: str) -> dict[str, Any]:
    """A run with two records, which draws little."""
    run = report_data.cpu_run(**machine)
    sizes = report_data.SIZES["online"]
    run["records"] = [report_data.record("online", sizes, "forward", name) for name in ("ours", "eager")]
    return run | {"exponents": []}
