"""Fitting the trend of `evengaze.debias.RowsColumns`: a row effect and a column effect on log scores."""

from __future__ import annotations

import numpy as np

from evengaze.calibration.means import Array
from evengaze.debias.beyond import RowsColumns
from evengaze.errors import CurveError


def fit_rows_columns(logs: Array, count: Array, *, smoothing: float = 1.0) -> RowsColumns:
    """Fit a row and a column effect to the mean logs of the scores of each cell.

    Args:
        logs: (rows, columns) mean log scores; anything where the count is 0.
        count: (rows, columns) how many scores each averages.
        smoothing: weight of the squared differences between neighbouring rows and columns, relative to the mean count
            of a row or column.

    Raises:
        CurveError: fewer than two rows or columns have data.
    """
    height, width = logs.shape
    if (count.sum(1) > 0).sum() < 2 or (count.sum(0) > 0).sum() < 2:
        raise CurveError("a rows-columns trend needs content in at least two rows and two columns")
    y = np.where(count > 0, logs, 0.0)
    row, column = np.zeros(height), np.zeros(width)
    for _ in range(50):
        row = _smooth((count * (y - column)).sum(1), count.sum(1), smoothing)
        column = _smooth((count * (y - row[:, None])).sum(0), count.sum(0), smoothing)
        column -= column.mean()
    return RowsColumns(tuple(np.exp(row).tolist()), tuple(np.exp(column).tolist()))


def _smooth(total: Array, count: Array, smoothing: float) -> Array:
    """Weighted means with a penalty on the differences between neighbours; places without data are bridged."""
    size = len(total)
    steps = np.diff(np.eye(size), axis=0)
    matrix = np.diag(count) + (smoothing * count.mean() / size) * steps.T @ steps
    return np.asarray(np.linalg.solve(matrix, total))
