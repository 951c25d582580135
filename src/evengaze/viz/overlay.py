"""The picture behind `Trace.plot`: which patches one stage of one row kept, with and without debiasing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evengaze.errors import DataError
from evengaze.layout import VisualTokens
from evengaze.pixels import views
from evengaze.protocol import top
from evengaze.viz.patches import Canvas, Drawing, draw_panels
from evengaze.viz.traced import Traced, TracedRow, row_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def plot_trace(
    trace: Traced,
    image: Image | Sequence[Image] | None = None,
    *,
    row: int = 0,
    stage: int = 0,
    picture: int | None = None,
) -> Figure:
    """Draw what a stage kept of a row's pictures: kept patches bright and outlined, dropped ones dim, padding hatched.

    Where the scores were debiased, the tokens that as many places would have gone to without debiasing are shown
    beside the actual choice. Kept padding is outlined in red.

    Args:
        trace: of the call.
        image: the picture as the user has it (one for each frame of a video); it is shown as the model saw it. None
            draws the grid alone. For a row of several pictures: a list of all of them, or one and `picture`.
        row: batch row.
        stage: which stage.
        picture: which picture of the row, counted from 0; all of them, one below the other, if left out.

    Raises:
        DataError: there is no such row, stage or picture, it is not said which of several pictures is given, or a video
            is given another number of frames.
    """
    if not trace.stages:
        raise DataError("nothing was pruned in this call: there is no stage to draw")
    decision = row_at(trace, row, stage)
    tokens = trace.layout.rows[row].to("cpu")
    plain = plain_choice(trace, row, stage)
    name = str(trace.pruner.get("method", "pruner"))
    label = f"{name}, debiased" if plain is not None else f"{name}, layer {trace.stages[stage].layer}"
    chosen = decision.kept.cpu()
    lines = []
    for number, given in _given(tokens, image, picture):
        canvas = Canvas.of(tokens, given, views(tokens, number)[0])
        line = []
        if given is not None:
            line.append(Drawing(canvas, "as the model saw it", _count(int(canvas.there.sum()), "visual token")))
        if plain is not None:
            line.append(Drawing(canvas, f"{name}, plain", canvas.describe(plain), plain))
        line.append(Drawing(canvas, label, canvas.describe(chosen), chosen, decision.recycled))
        lines.append(line)
    return draw_panels(lines)


def _given(tokens: VisualTokens, image: Any, picture: int | None) -> list[tuple[int, Any]]:
    """The pictures to draw, by number, and what was given for each."""
    count = sum(info.part == 0 for info in tokens.images)
    if picture is not None or count <= 1:
        return [(picture or 0, image)]
    if image is None:
        return [(number, None) for number in range(count)]
    if not isinstance(image, Sequence) or len(image) != count:
        raise DataError(
            f"the row has {count} pictures: give all of them in a list, or say which one this is (picture=0 to "
            f"picture={count - 1})"
        )
    return list(enumerate(image))


def plain_choice(trace: Traced, row: int = 0, stage: int = 0) -> Tensor | None:
    """The tokens that the kept places would have gone to by raw score among all candidates.

    Returns:
        (m,) indices into the row's visual tokens, as many as were kept; None if the stage was not debiased.
    """
    at, before = trace.stages[stage], trace.stages[: stage % len(trace.stages)]
    decision: TracedRow = at.rows[row]
    debias = trace.pruner.get("debias")
    if not debias or at.attention is None or decision.raw is None or decision.scores is None:
        return None
    if debias.get("stages", "first") == "first" and any(earlier.attention is not None for earlier in before):
        return None
    if debias.get("padding") is None and torch.equal(decision.raw, decision.scores):
        return None
    return decision.candidates.cpu()[top(decision.raw.cpu(), len(decision.kept))]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
