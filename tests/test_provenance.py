"""What a figure was measured on: the commit, the processor."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from fastac import provenance


def test_the_commit_of_the_checkout_or_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "", "status": "", "rev-parse": "0123456789ab"}

    def git(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        answer = answers[command[3]]
        if answer == "error":
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    monkeypatch.setattr(subprocess, "run", git)
    assert provenance.commit() == "0123456789ab"
    answers["status"] = " M fastac/modules.py"
    assert provenance.commit() == "0123456789ab-dirty"
    answers["ls-files"] = "error"  # installed below somebody else's checkout
    assert re.fullmatch(r"v\d.*", provenance.commit())


def test_rows_added_to_the_results_change_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "fastac" / "provenance.py"
    rows = tmp_path / "benchmarks" / "results" / "rows.csv"
    for path in (code, code.with_name("__init__.py"), rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    who = ("-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false")
    for command in (["init"], ["add", "."], [*who, "commit", "--message", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(provenance, "__file__", str(code))
    clean = provenance.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    rows.write_text("after")
    assert provenance.commit() == clean
    code.write_text("after")
    assert provenance.commit() == f"{clean}-dirty"


def test_the_processor_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.cpu_model()

    def unreadable(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert provenance.cpu_model() == platform.machine()
