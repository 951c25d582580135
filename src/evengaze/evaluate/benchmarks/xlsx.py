"""The one spreadsheet format that a server takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.extras import require
from evengaze.files import write_whole

# Control characters, halves of characters and non-characters, which a spreadsheet cannot hold.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
LONGEST = 32_767
"""Characters (UTF-16 units) that a cell holds."""


def _openpyxl() -> Any:
    require("evaluate", "an xlsx file", "openpyxl")
    import openpyxl

    return openpyxl


def write_xlsx(out: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[int]:
    """Write a sheet named Sheet1 with a header line; None leaves a cell empty.

    Text stays text (also when it starts with `=`); what the format cannot hold becomes a space.

    Returns:
        Indices of the rows in which a text was cut, as no cell holds all of it.

    Raises:
        DataError: The file cannot be written.
        MissingExtraError: openpyxl is not installed.
    """
    book = _openpyxl().Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    cut: list[int] = []
    for number, row in enumerate([columns, *rows], 1):
        for column, value in enumerate(row, 1):
            cell = sheet.cell(number, column)
            if isinstance(value, str):
                text = _ILLEGAL.sub(" ", value)
                units = text.encode("utf-16-le")
                if len(units) > 2 * LONGEST:
                    text = units[: 2 * LONGEST].decode("utf-16-le", "ignore")
                    cut.append(number - 2)
                cell.value = text
                cell.data_type = "s"
            else:
                cell.value = value
    buffer = BytesIO()
    book.save(buffer)
    write_whole(out, buffer.getvalue())
    return cut


def read_xlsx(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """Read the first sheet; its first line names the columns.

    Raises:
        DataError: The file is missing, no spreadsheet, or lacks a column.
        MissingExtraError: openpyxl is not installed.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the submission xlsx.")
    openpyxl = _openpyxl()
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        lines = list(book.worksheets[0].iter_rows(values_only=True))
    except Exception as error:  # damaged archives and XML raise whatever their readers stumble over
        raise DataError(f"{path} is not a readable xlsx file: {error}. Write it again.") from error
    header = [str(cell) for cell in lines[0]] if lines else []
    absent = [name for name in required if name not in header]
    if absent:
        raise DataError(f"{path} has no column {', '.join(absent)}; its columns are {', '.join(header)}.")
    return [dict(zip(header, line, strict=False)) for line in lines[1:]]
