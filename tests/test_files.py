"""Files from outside are read, and ours written, in one place; every failure names the file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from evengaze.errors import DataError
from evengaze.evaluate.jsonl import read_answers
from evengaze.files import read_bytes, read_json, read_text, write_whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a": 1', "may be cut off"),
        (b"[1]", "a dict was expected"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_json_object_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_json(path, dict)
    assert str(path) in str(caught.value)


def test_not_a_number_is_refused_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": NaN}')
    assert read_json(path, dict)["a"] != 0
    with pytest.raises(DataError, match="NaN is no number"):
        read_json(path, dict, strict=True)


def test_absent_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone does not exist\. Get it there"):
        read_bytes(tmp_path / "gone", "Get it there")
    with pytest.raises(DataError, match="is a directory"):
        read_bytes(tmp_path)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path, dict) == {"a": 1}
    assert read_text(path) == '{"a": 1}'
    for content in (b'{"question_id": 1, "text": "a"}\n', b'[{"question_id": 1, "text": "a"}]'):
        path.write_bytes(b"\xef\xbb\xbf" + content)
        lines = read_answers(path)
        assert [row["text"] for row in lines.records] == ["a"]
        assert not lines.malformed


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.json"
    write_whole(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evengaze.files.os.fsync", full)
    with pytest.raises(
        DataError, match=r"a\.json: the disk is full \(No space left on device\)\. Free disk space and try again\.$"
    ):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old = time.time() - 3600
    for name in (".a.json.0123abcd.part", ".b.json.0123abcd.part", ".a.json.4567.part"):
        (tmp_path / name).write_text("half")
        if name != ".a.json.4567.part":  # a young one may be somebody's
            os.utime(tmp_path / name, (old, old))
    write_whole(tmp_path / "a.json", "{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json.4567.part", ".b.json.0123abcd.part", "a.json"]


def test_text_that_no_encoding_has_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "x\ud800y")
    assert (tmp_path / "a").read_text() == "x?y"
