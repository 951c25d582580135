"""Reading and writing files: errors name the file, what was expected and what to do; a write is whole or not at all.

The one place where files are written so that a killed process leaves the old or the new content, and where JSON from
outside is read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from evengaze.errors import DataError

_LFS = b"version https://git-lfs"
_PART = ".part"
_ORPHANED = 600.0
"""Seconds after which nobody is still at a file that takes a moment to write."""


def read_bytes(path: Path, hint: str = "") -> bytes:
    """Read a file.

    Args:
        path: file to read.
        hint: where the file can be had; appended to the message when it is missing.

    Raises:
        DataError: the file is missing, is a directory, cannot be read, or is what Git LFS leaves in a file's place.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.{' ' + hint if hint else ''}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory, a file was expected.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{path} cannot be read: {error}. Check its permissions and the disk.") from error
    if raw.startswith(_LFS):
        raise DataError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` where it was cloned.")
    return raw


def read_text(path: Path, hint: str = "") -> str:
    """Read a UTF-8 text file; a byte order mark at its start is not part of the text.

    Raises:
        DataError: as `read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(path, hint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). {hint}".strip()) from None


def parse_json(text: str, *, strict: bool = False) -> Any:
    """Read one JSON value.

    Args:
        text: the text.
        strict: refuse NaN and infinities, which Python's `json` reads and writes but JSON does not have.

    Raises:
        ValueError: not JSON, nested too deeply, or with numbers of thousands of digits.
    """
    try:
        return json.loads(text, parse_constant=_refuse if strict else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def read_json(path: Path, kind: type, hint: str = "", *, strict: bool = False) -> Any:
    """Read one JSON document of a known top-level type.

    Args:
        path: file to read.
        kind: `dict` or `list`.
        hint: where the file can be had, or what to do about a damaged one.
        strict: see `parse_json`.

    Raises:
        DataError: missing, not UTF-8, not JSON (as after a broken download), or of another type.
    """
    text = read_text(path, hint)
    try:
        value = parse_json(text, strict=strict)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); it is "
            f"{len(text.encode())} bytes long and may be cut off. {hint or 'Fetch it again.'}"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}). {hint or 'Fetch it again.'}") from None
    if not isinstance(value, kind):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, a {kind.__name__} was expected. {hint}".strip())
    return value


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file such that at any moment either the old or the new content is there.

    Its folder is made. What an earlier process left half-written beside it is removed.

    Raises:
        DataError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_PART}")
    raw = content.encode("utf-8", "replace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        _sweep(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError, advice: str = "Free disk space and try again.") -> DataError:
    """The error to raise when a file cannot be written.

    Args:
        path: the file.
        error: what the system said.
        advice: what to do where the disk is full.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(f"{path}: the disk is full ({error.strerror}). {advice}")
    return DataError(f"{path} cannot be written: {error}. Check the folder's permissions and the disk.")


def sync_folder(folder: Path) -> None:
    """Make a new file's name durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove what killed processes left half-written; young files may belong to a process of another machine."""
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
        with contextlib.suppress(OSError):
            if time.time() - orphan.stat().st_mtime > _ORPHANED:
                orphan.unlink()
