"""What a figure needs to know of a call. `evengaze.trace.Trace` is it; how it is recorded is not asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from evengaze.errors import DataError
from evengaze.layout import VisualLayout


class TracedRow(Protocol):
    """One row at one stage; see `trace.RowTrace`."""

    @property
    def candidates(self) -> Tensor:
        """(n,) tokens that arrived."""

    @property
    def kept(self) -> Tensor:
        """(m,) tokens that survived."""

    @property
    def recycled(self) -> Tensor | None:
        """(c,) tokens that stand for merged ones."""

    @property
    def raw(self) -> Tensor | None:
        """(n,) scores before debiasing."""

    @property
    def scores(self) -> Tensor | None:
        """(n,) scores after it."""


class TracedStage(Protocol):
    """One stage; see `trace.StageTrace`."""

    @property
    def layer(self) -> int:
        """Where the tokens left."""

    @property
    def attention(self) -> str | None:
        """Whose attention ranked them; None if none did."""

    @property
    def rows(self) -> Sequence[TracedRow]:
        """One entry a row."""


class Traced(Protocol):
    """One prefill; see `trace.Trace`."""

    @property
    def pruner(self) -> Mapping[str, Any]:
        """The method's parameters."""

    @property
    def layout(self) -> VisualLayout:
        """The visual tokens of every row."""

    @property
    def stages(self) -> Sequence[TracedStage]:
        """By ascending layer."""


def row_at(trace: Traced, row: int, stage: int) -> TracedRow:
    """What a stage kept of a row.

    Raises:
        DataError: there is no such row or stage.
    """
    stages, rows = len(trace.stages), len(trace.layout.rows)
    if not -stages <= stage < stages or not 0 <= row < rows:
        raise DataError(f"the trace has {stages} stages and {rows} rows; there is no stage {stage} of row {row}")
    return trace.stages[stage].rows[row]
