"""The examples, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from feature_files import make_videos, write_npy

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """On one thread: other tests have the other cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_multimodal_example_reaches_what_it_promises() -> None:
    command = [sys.executable, str(EXAMPLES / "multimodal.py")]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    reached = {
        name: float(value)
        for name, value in re.findall(r"^(.+?) +test accuracy +([\d.]+)%", done.stdout, re.M)
    }
    assert reached.keys() == {"mean pooling", "attention cluster"}
    assert reached["attention cluster"] > 90
    assert reached["mean pooling"] < 40


def test_the_multimodal_example_fails_where_the_promise_is_broken() -> None:
    """One step of the optimizer an epoch is too little for either."""
    script = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.argv[1:] = ['--epochs', '1']\n"
        "import multimodal\n"
        "multimodal.CLASSES, multimodal.TRAIN_VIDEOS, multimodal.TEST_VIDEOS = 50, 50, 50\n"
        "sys.exit(multimodal.main())\n"
    )
    done = run([sys.executable, "-c", script])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "expected: cluster above 90%" in done.stdout


def test_the_code_of_the_training_page_runs(tmp_path: Path) -> None:
    videos = make_videos()
    write_npy(tmp_path / "features", videos)
    splits = ("train", "train", "validation")
    rows = [f"{name},class{i % 2},{splits[i % 3]}\n" for i, name in enumerate(videos)]
    (tmp_path / "labels.csv").write_text("video,label,split\n" + "".join(rows))
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/training.md").read_text(), re.M | re.S)
    code += "assert not best.training\nassert best.modalities == model.modalities\n"
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
