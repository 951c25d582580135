"""Freeing scores of position and padding bias: masks, trend curves and published presets.

They are applied here, and measured in `evengaze.calibration`.
"""

from __future__ import annotations

from evengaze.debias.beyond import Prior, RowsColumns, SampleTrend, SinkMask
from evengaze.debias.curve import Curve, CurveWarning, Origin
from evengaze.debias.debias import Debias
from evengaze.debias.padding import PaddingMask
from evengaze.debias.presets import preset, preset_names
from evengaze.debias.trend import (
    Exponential,
    ExponentialFloor,
    Isotonic,
    Polynomial,
    ReciprocalPolynomial,
    Table,
    TrendCurve,
)

__all__ = [
    "Curve",
    "CurveWarning",
    "Debias",
    "Exponential",
    "ExponentialFloor",
    "Isotonic",
    "Origin",
    "PaddingMask",
    "Polynomial",
    "Prior",
    "ReciprocalPolynomial",
    "RowsColumns",
    "SampleTrend",
    "SinkMask",
    "Table",
    "TrendCurve",
    "preset",
    "preset_names",
]
