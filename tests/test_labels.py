"""Labels from CSV files: what is read, how classes are numbered, and every mistake named at once."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from fastac.data.labels import Classes, encode_labels, read_labels
from fastac.data.problems import DataProblemsError, Problem, listing, write_problems


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def encoded(path: Path, split: str | None = None, **options: Any) -> Classes:
    table = read_labels(path)
    return encode_labels(table, table.rows(split), **options)


def mistakes(path: Path) -> list[Problem]:
    with pytest.raises(DataProblemsError) as caught:
        read_labels(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_reads_what_spreadsheets_write(tmp_path: Path) -> None:
    text = (
        '\ufefflabel, video ,note,split,\r\n"Playing, guitar",v/a,x,train,\r\n'
        '\r\n diving ,b,"1\n2",test,\r\n,,,,\r\n'
    )
    table = read_labels(written(tmp_path, text))
    assert table.videos == ["v/a", "b"]
    assert table.cells == ["Playing, guitar", "diving"]
    assert table.splits == ["train", "test"]
    assert table.rows("test") == [1]
    assert table.rows(None) == [0, 1]


def test_unicode_names_and_no_split(tmp_path: Path) -> None:
    table = read_labels(written(tmp_path, "video,label\nüben,体操\na\u2028b,x\n"))
    assert table.videos == ["üben", "a\u2028b"]
    assert table.splits is None
    with pytest.raises(ValueError, match=r"split 'train' needs a column 'split' in .*labels\.csv"):
        table.rows("train")


def test_unknown_split_lists_those_there(tmp_path: Path) -> None:
    table = read_labels(written(tmp_path, "video,label,split\na,x,train\nb,x,train\nc,y,val\n"))
    with pytest.raises(ValueError, match=r"train \(2\), val \(1\); got 'test'"):
        table.rows("test")


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    text = (
        "video,label,split\n"
        "a,x,train\n"
        "b,,train\n"  # 3
        ",x,train\n"  # 4
        "c,x,\n"  # 5
        "a,y,test\n"  # 6
        "d,Playing, guitar,train\n"  # 7
        "e,x\n"  # 8
        "f,x,train\n"
    )
    found = {(p.where, p.video, p.what) for p in mistakes(written(tmp_path, text))}
    assert found == {
        ("line 3", "b", "empty cell"),
        ("line 4", "", "empty cell"),
        ("line 5", "c", "empty cell"),
        ("line 6", "a", "video twice"),
        ("line 7", "d", "wrong number of cells"),
        ("line 8", "e", "wrong number of cells"),
    }


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        ("", "empty", "no header"),
        ("\n\n", "empty", "no header"),
        ("video,label\n", "empty", "no rows"),
        ("name,label\na,x\n", "no column 'video'", "'name', 'label'"),
        ("a;b\n1;2\n", "no column 'label'", "separated by commas"),
        ("video,label,label\na,x,y\n", "column 'label' twice", ""),
        ('video,label\na,"x\nb,y\n', "not CSV", "unexpected end"),
        ("video,label\na,x\0\n", "not text", "byte 0"),
        ("video,label\na,x\n".encode("utf-16"), "wrong encoding", "UTF-16"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str | bytes, what: str, found: str) -> None:
    problems = mistakes(written(tmp_path, text))
    assert what in [p.what for p in problems]
    assert all(found in p.found for p in problems)


def test_every_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    text = "video,label\na,x\nb,caf\xe9\nc,x\nd,na\xefve\n".encode("latin-1")
    problems = mistakes(written(tmp_path, text))
    assert [p.where for p in problems] == ["line 3", "line 5"]
    assert "0xe9" in problems[0].found


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"labels must be a CSV file, there is none at .*none\.csv"):
        read_labels(tmp_path / "none.csv")


def test_classes_are_sorted_names(tmp_path: Path) -> None:
    classes = encoded(written(tmp_path, "video,label\na,walk\nb,dive\nc,walk\n"))
    assert classes.names == ["dive", "walk"]
    assert classes.labels.tolist() == [1, 0, 1]
    assert classes.labels.dtype == torch.int64


def test_integers_are_sorted_by_value(tmp_path: Path) -> None:
    classes = encoded(written(tmp_path, "video,label\na,10\nb,9\nc,-1\n"))
    assert classes.names == ["-1", "9", "10"]
    assert classes.labels.tolist() == [2, 1, 0]


def test_classes_come_from_the_training_split(tmp_path: Path) -> None:
    path = written(tmp_path, "video,label,split\na,z,train\nb,y,train\nc,z,val\n")
    assert encoded(path, "val").names == ["y", "z"]
    assert encoded(path, "val").labels.tolist() == [1]
    other = written(tmp_path, "video,label,split\na,z,one\nb,y,two\n")
    assert encoded(other, "one").names == ["y", "z"]  # no split train: all rows


def test_labels_outside_of_the_classes_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "video,label,split\na,z,train\nb,q,val\nc,r,val\nd,q,val\n")
    with pytest.raises(DataProblemsError, match=r"^2 labels in .* are not among the 1 classes") as caught:
        encoded(path, "val")
    assert [(p.video, p.what, p.where) for p in caught.value.problems] == [
        ("b", "unknown label 'q'", "line 3"),
        ("c", "unknown label 'r'", "line 4"),
        ("d", "unknown label 'q'", "line 5"),
    ]
    with pytest.raises(DataProblemsError, match=r"not among the 2 classes \(z, q\):"):
        encoded(path, class_names=["z", "q"])


def test_given_classes_keep_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, "video,label\na,x\nb,y\n")
    classes = encoded(path, class_names=["y", "unused", "x"])
    assert classes.names == ["y", "unused", "x"]
    assert classes.labels.tolist() == [2, 0]


def test_integer_labels_are_numbers_of_named_classes(tmp_path: Path) -> None:
    path = written(tmp_path, "video,label\na,2\nb,0\n")
    assert encoded(path, class_names=["x", "y", "z"]).labels.tolist() == [2, 0]
    assert encoded(path, class_names=["2", "1", "0"]).labels.tolist() == [0, 2]  # they are names here
    with pytest.raises(DataProblemsError, match="unknown label '2'"):
        encoded(path, class_names=["x", "y"])


def test_integer_labels_beside_names_are_unknown(tmp_path: Path) -> None:
    path = written(tmp_path, "video,label,split\na,x,train\nb,y,train\nc,0,val\nd,1,val\n")
    training = encoded(path, "train").names
    with pytest.raises(
        DataProblemsError, match=r"^2 labels in .* are not among the 2 classes \(x, y\):"
    ) as caught:
        encoded(path, "val", class_names=training)
    assert [(p.video, p.what) for p in caught.value.problems] == [
        ("c", "unknown label '0'"),
        ("d", "unknown label '1'"),
    ]


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ("abc", TypeError, "sequence of str, got str"),
        ([1, 2], TypeError, "it has a int: 1"),
        ([], ValueError, "not empty"),
        (["a", " "], ValueError, "not empty"),
        (["a", "b", "a"], ValueError, "there twice: a"),
    ],
)
def test_class_names_are_checked(tmp_path: Path, names: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^class_names must .*{text}"):
        encoded(written(tmp_path, "video,label\na,x\n"), class_names=names)


def test_multi_label(tmp_path: Path) -> None:
    path = written(tmp_path, "video,label\na,x;y\nb,z\nc, y | x |\nd,x;x\n")
    classes = encoded(path, multi_label=True)
    assert classes.names == ["x", "y", "z"]
    assert classes.labels.dtype == torch.float32
    assert classes.labels.tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 0]]
    assert encoded(path).names == ["x;x", "x;y", "y | x |", "z"]  # only where it was asked for
    assert mistakes(written(tmp_path, "video,label\na, ; |\n"))[0].what == "empty cell"


def test_long_listings_are_whole(tmp_path: Path) -> None:
    rows = "".join(f"v{i},\n" for i in range(1234))
    with pytest.raises(DataProblemsError) as caught:
        read_labels(written(tmp_path, "video,label\n" + rows))
    message = str(caught.value)
    assert len(message.splitlines()) == 1235
    assert "has 1,234 problems" in message
    assert len(caught.value.problems) == 1234
    write_problems(caught.value.problems, tmp_path / "problems.csv")
    with (tmp_path / "problems.csv").open(newline="") as file:
        written_rows = list(csv.DictReader(file))
    assert [row["video"] for row in written_rows] == [f"v{i}" for i in range(1234)]
    assert list(written_rows[0]) == ["video", "modality", "what", "found", "where"]


def test_a_problem_is_one_line() -> None:
    problem = Problem("v", "rgb", "unreadable", "OSError: two\nlines", "/a/v.npy")
    assert str(problem) == "v [rgb]: unreadable: OSError: two lines (/a/v.npy)"
    assert str(Problem("", None, "empty", "")) == "empty"
    assert listing([problem]) == f"  {problem}"
