"""Every family of trends by name, and reading one back from a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evengaze.debias.beyond import Prior, RowsColumns, SampleTrend
from evengaze.debias.trend import (
    Exponential,
    ExponentialFloor,
    Isotonic,
    Polynomial,
    ReciprocalPolynomial,
    Table,
    Trend,
)
from evengaze.errors import CurveError

FAMILIES: dict[str, Callable[..., Trend]] = {
    kind.family: kind
    for kind in (
        *(Exponential, ExponentialFloor, Polynomial, ReciprocalPolynomial, Isotonic, Table),
        *(RowsColumns, SampleTrend, Prior),
    )
}


def trend_from_dict(values: dict[str, Any]) -> Trend:
    """The inverse of a trend's `to_dict`.

    Raises:
        CurveError: the family is unknown or its parameters are missing, too many or no numbers.
    """
    if not isinstance(values, dict) or not isinstance(values.get("family"), str):
        raise CurveError(f"a trend needs a 'family', one of {', '.join(FAMILIES)}; got {values!r:.200}")
    family = FAMILIES.get(values["family"])
    if family is None:
        raise CurveError(f"unknown family {values['family']!r}; known: {', '.join(FAMILIES)}")
    parameters = {k: v for k, v in values.items() if k != "family"}
    try:
        return family(**parameters)
    except TypeError as error:
        raise CurveError(f"wrong parameters for the {values['family']} trend: {error}") from None
