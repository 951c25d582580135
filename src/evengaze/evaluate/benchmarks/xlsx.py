"""The one spreadsheet format that a server takes."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evengaze.errors import ConfigError, DataError

# Control characters that a spreadsheet cannot hold.
_ILLEGAL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def _openpyxl() -> Any:
    try:
        import openpyxl
    except ImportError:
        raise ConfigError("xlsx files need openpyxl: pip install 'evengaze[evaluate]'") from None
    return openpyxl


def write_xlsx(out: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a sheet named Sheet1 with a header line; None leaves a cell empty.

    Text stays text (also when it starts with ``=``); control characters, which the format cannot hold, become spaces.

    Raises:
        DataError: The file cannot be written.
    """
    book = _openpyxl().Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    for number, row in enumerate([columns, *rows], 1):
        for column, value in enumerate(row, 1):
            cell = sheet.cell(number, column)
            if isinstance(value, str):
                cell.value = _ILLEGAL.sub(" ", value)
                cell.data_type = "s"
            else:
                cell.value = value
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        book.save(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}. Check the folder's permissions and the disk.") from error


def read_xlsx(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """Read the first sheet; its first line names the columns.

    Raises:
        DataError: The file is missing, no spreadsheet, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the submission xlsx.")
    try:
        book = _openpyxl().load_workbook(path, read_only=True, data_only=True)
        lines = list(book.worksheets[0].iter_rows(values_only=True))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a readable xlsx file: {error}. Write it again.") from error
    header = [str(cell) for cell in lines[0]] if lines else []
    absent = [name for name in required if name not in header]
    if absent:
        raise DataError(f"{path} has no column {', '.join(absent)}; its columns are {', '.join(header)}.")
    return [dict(zip(header, line, strict=False)) for line in lines[1:]]
