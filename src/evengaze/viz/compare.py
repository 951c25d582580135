"""Several methods on one picture: what each kept, plain and debiased, in one grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evengaze.errors import DataError
from evengaze.pixels import views
from evengaze.viz.patches import Canvas, Drawing, draw_panels
from evengaze.viz.traced import Traced, row_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


@dataclass(frozen=True)
class Compared:
    """One run of a method.

    Attributes:
        label: what to call it, such as the method's specification.
        trace: what it kept.
        answer: what the model said.
        right: whether that is right, or what it says with all tokens; None if it is not known.
    """

    label: str
    trace: Traced
    answer: str = ""
    right: bool | None = None


def plot_comparison(
    runs: Sequence[Sequence[Compared | None]],
    image: Image | Sequence[Image] | None = None,
    *,
    question: str = "",
    dense: str = "",
    right: str = "",
    row: int = 0,
    stage: int = 0,
    picture: int = 0,
) -> Figure:
    """Draw the kept tokens of several runs on the same picture: one column a method, the picture itself in front.

    Args:
        runs: one entry a method: its runs from top to bottom, such as plain and debiased. None leaves a place empty.
        image: the picture as the user has it (one for each frame of a video).
        question: shown above.
        dense: the unpruned model's answer, shown with the picture.
        right: the right answer, shown with it; what `Compared.right` refers to.
        row: batch row of the traces.
        stage: which stage; the first is the one that is debiased.
        picture: which picture of the row.

    Raises:
        DataError: no runs, columns of different length, or there is no such row, stage or picture.
    """
    first = next((run for column in runs for run in column if run is not None), None)
    if first is None or len({len(column) for column in runs}) != 1:
        raise DataError("a comparison needs at least one run, and equally many runs of every method")
    rows = first.trace.layout.rows
    if not 0 <= row < len(rows):
        raise DataError(f"the traces have {len(rows)} rows; there is no row {row}")
    tokens = rows[row].to("cpu")
    canvas = Canvas.of(tokens, image, views(tokens, picture)[0])
    said = f"all tokens: {dense!r}" + (f" (right: {right!r})" if right else "") if dense else ""
    lead = Drawing(canvas, "as the model saw it", _short(said))
    panels: list[list[Drawing | None]] = []
    for line in range(len(runs[0])):
        cells: list[Drawing | None] = [lead if line == 0 else None]
        for column in runs:
            run = column[line]
            cells.append(None if run is None else _panel(canvas, run, row, stage))
        panels.append(cells)
    return draw_panels(panels, height=2.9, heading=_short(question, 100))


def _panel(canvas: Canvas, run: Compared, row: int, stage: int) -> Drawing:
    if not run.trace.stages:
        return Drawing(canvas, run.label, _short(run.answer), right=run.right)
    decision = row_at(run.trace, row, stage)
    kept = decision.kept.cpu()
    recycled = None if decision.recycled is None else decision.recycled.cpu()
    detail = canvas.describe(kept) + (f": {run.answer!r}" if run.answer else "")
    return Drawing(canvas, run.label, _short(detail), kept, recycled, run.right)


def _short(text: str, width: int = 52) -> str:
    """One line."""
    return textwrap.shorten(text, width, placeholder=" ...")
