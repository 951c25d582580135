"""Answers on disk: append-only shards that survive being killed, and the merged file in LLaVA's record format.

A cell's folder holds:

    fingerprint.json           what the answers depend on
    shards/answers-0.jsonl     one file for each rank, in the order of answering; every batch is fsynced
    shards/errors-0.jsonl      records that could not be read
    answers.jsonl              all shards merged, in the dataset's order, nothing twice
    errors.jsonl               records that are still without an answer
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from evengaze.errors import DataError
from evengaze.evaluate.jsonl import Answer, read_jsonl, repair_tail
from evengaze.files import cannot_write, sync_folder, write_whole

ANSWERS, ERRORS, SHARDS = "answers.jsonl", "errors.jsonl", "shards"
_KEPT = (
    "All answers written so far are safe; free disk space and give the same command again, it goes on where it stopped."
)


class Shard:
    """An append-only JSON-lines file. What `append` has returned from is on the disk.

    Opening it repairs a last line that was cut off when an earlier run was killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            repair_tail(path)
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            sync_folder(path.parent)
        except OSError as error:
            raise cannot_write(path, error, _KEPT) from error

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write lines, all or none of them, and wait until the disk has them.

        Raises:
            DataError: the disk is full or gone; the file ends with the last complete line.
        """
        if not lines:
            return
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        size = os.fstat(self._handle).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._handle, data[written:])
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, size)
            raise cannot_write(self.path, error, _KEPT) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def shard(folder: Path, rank: int, kind: str = "answers") -> Shard:
    """Open a rank's shard of "answers" or "errors"."""
    return Shard(folder / SHARDS / f"{kind}-{rank}.jsonl")


def read_shards(folder: Path, kind: str = "answers") -> dict[str, Answer]:
    """Read what all ranks have written, by record key; of several lines for one record the first counts.

    Raises:
        DataError: a line within a shard is damaged.
    """
    found: dict[str, Answer] = {}
    for path in sorted((folder / SHARDS).glob(f"{kind}-*.jsonl")):
        lines = read_jsonl(path, ("metadata",))
        # Another rank may be writing right now, so that an incomplete last line is no damage.
        damaged = [bad for bad in lines.malformed if not (lines.torn and bad is lines.malformed[-1])]
        if damaged:
            raise DataError(
                f"{path} line {damaged[0].line}: {damaged[0].reason} ({damaged[0].excerpt!r}). Delete that line; its "
                "record is answered again."
            )
        for line in lines.records:
            if not isinstance(line["metadata"], dict) or "key" not in line["metadata"]:
                raise DataError(f"{path} holds a line without metadata.key ({str(line)[:80]}). Delete that line.")
            found.setdefault(str(line["metadata"]["key"]), line)
    return found


def merge(folder: Path, keys: Sequence[str]) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Write `answers.jsonl` and `errors.jsonl` from all shards; doing it again changes nothing.

    Args:
        folder: the cell's folder.
        keys: keys of all records, in the dataset's order.

    Returns:
        Answers, and the errors of records without an answer, by key.

    Raises:
        DataError: a shard is damaged, or holds answers to records that the dataset does not have.
    """
    with FileLock(folder / ".merge.lock"):
        answers, errors = read_shards(folder), read_shards(folder, "errors")
        strangers = sorted({*answers, *errors} - set(keys))
        if strangers:
            raise DataError(
                f"{folder / SHARDS} holds answers to records that the dataset does not have, such as {strangers[0]!r}. "
                "Give another out folder for another dataset."
            )
        answers = {key: answers[key] for key in keys if key in answers}
        errors = {key: errors[key] for key in keys if key in errors and key not in answers}
        write_whole(folder / ANSWERS, "".join(json.dumps(line) + "\n" for line in answers.values()))
        write_whole(folder / ERRORS, "".join(json.dumps(line) + "\n" for line in errors.values()))
    return answers, errors


@contextlib.contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Keep a second run of the same rank out of a folder. The system releases the lock when a process dies.

    Raises:
        DataError: another run is at work there.
    """
    lock = FileLock(folder / f".run-{rank}.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataError(
            f"another run is writing to {folder}. Wait until it ends, or give this one another out folder."
        ) from None
    except OSError as error:
        raise cannot_write(folder, error, _KEPT) from error
    try:
        yield
    finally:
        lock.release()
