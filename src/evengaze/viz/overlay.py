"""The picture behind `Trace.plot`: which patches one stage of one row kept, with and without debiasing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evengaze.errors import DataError
from evengaze.protocol import top
from evengaze.viz.patches import Canvas, Panel, draw_panels
from evengaze.viz.traced import Decision, Traced

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def plot_trace(
    trace: Traced,
    image: Image | Sequence[Image] | None = None,
    *,
    row: int = 0,
    stage: int = 0,
    picture: int = 0,
) -> Figure:
    """Draw what a stage kept of one picture: kept patches bright and outlined, dropped ones dim, padding hatched.

    Where the scores were debiased, the tokens that as many places would have gone to without debiasing are shown
    beside the actual choice. Kept padding is outlined in red.

    Args:
        trace: of the call.
        image: the picture as the user has it (one for each frame of a video); it is shown as the model saw it. None
            draws the grid alone.
        row: batch row.
        stage: which stage.
        picture: which picture of the row.

    Raises:
        DataError: there is no such row, stage or picture, or a video is given another number of frames.
    """
    if not trace.stages:
        raise DataError("nothing was pruned in this call: there is no stage to draw")
    if not -len(trace.stages) <= stage < len(trace.stages) or not 0 <= row < len(trace.layout.rows):
        raise DataError(
            f"the trace has {len(trace.stages)} stages and {len(trace.layout.rows)} rows; there is no stage {stage} of "
            f"row {row}"
        )
    at = trace.stages[stage]
    decision = at.rows[row]
    canvas = Canvas.of(trace.layout.rows[row].to("cpu"), image, picture)
    plain = plain_choice(trace, row, stage)
    name = str(trace.pruner.get("method", "pruner"))

    panels = []
    if image is not None:
        panels.append(Panel(canvas, "as the model saw it", _count(int(canvas.there.sum()), "visual token")))
    if plain is not None:
        panels.append(Panel(canvas, f"{name}, plain", canvas.describe(plain), plain))
    label = f"{name}, debiased" if plain is not None else f"{name}, layer {at.layer}"
    chosen = decision.kept.cpu()
    panels.append(Panel(canvas, label, canvas.describe(chosen), chosen, decision.recycled))
    return draw_panels([panels])


def plain_choice(trace: Traced, row: int = 0, stage: int = 0) -> Tensor | None:
    """The tokens that the kept places would have gone to by raw score among all candidates.

    Returns:
        (m,) indices into the row's visual tokens, as many as were kept; None if the stage was not debiased.
    """
    decision: Decision = trace.stages[stage].rows[row]
    debias = trace.pruner.get("debias")
    number = stage % len(trace.stages)
    if not debias or decision.raw is None or decision.scores is None:
        return None
    if debias.get("stages", "first") == "first" and number > 0:
        return None
    if debias.get("padding") is None and torch.equal(decision.raw, decision.scores):
        return None
    return decision.candidates.cpu()[top(decision.raw.cpu(), len(decision.kept))]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
