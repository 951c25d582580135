"""Calibrating the trend of a model: run it on pictures, watch a method rank, fit.

curve = calibrate(model, processor, samples, FastV(layer=2))
curve.save("curve.json")
pruner = FastV(keep=64, layer=2, debias=Debias.load("curve.json"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import nn

from evengaze.calibration.fit import Family, Fit, Fitted, fit_curve
from evengaze.calibration.observe import Encode, Observations, Sample, observe
from evengaze.calibration.observer import first_layer
from evengaze.calibration.rows_columns import fit_rows_columns
from evengaze.calibration.stats import LayerStats
from evengaze.debias.curve import Curve, Origin, hash_data
from evengaze.errors import CurveError
from evengaze.methods.base import Pruner
from evengaze.models import adapter_for


def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    method: Pruner,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    target: Literal["attention", "frequency"] = "attention",
    family: Family | Literal["rows-columns"] = "auto",
    fit: Fit | None = None,
    batch_size: int = 4,
    tolerance: float | None = None,
    encode: Encode | None = None,
    state: Observations | None = None,
    after_batch: Callable[[Observations], bool] | None = None,
    origin: Origin | None = None,
) -> Curve:
    """Measure and fit the trend of a method's ranking on a model.

    What is not described here (model to after_batch) is as in `observe`.

    Args:
        family: see `evengaze.calibration.fit.fit_curve`; or "rows-columns", see `evengaze.debias.beyond`.
        fit: see there.
        tolerance: stop as soon as the confidence band's bounds are within this fraction of the trend everywhere.
        origin: what is known of the model and data in words; the rest is filled in.

    Raises:
        CurveError: no picture was seen, or no trend can be fitted.
    """

    def finished(now: Observations) -> bool:
        stop = after_batch is not None and after_batch(now)
        return stop or (tolerance is not None and tight(now, tolerance, batch_size, family=family, fit=fit))

    if state is not None and tolerance is not None and tight(state, tolerance, batch_size, family=family, fit=fit):
        found = state  # it stopped here before
    else:
        found = observe(
            model,
            processor,
            samples,
            method,
            layers=layers,
            target=target,
            batch_size=batch_size,
            encode=encode,
            state=state,
            after_batch=finished,
        )
    depth = len(adapter_for(model).decoder(model).layers)  # type: ignore[arg-type]
    own = first_layer(method, depth)
    return to_curve(found, own, family=family, fit=fit, origin=origin or _known(model))


def tight(
    found: Observations,
    tolerance: float,
    batch_size: int = 1,
    *,
    family: Family | Literal["rows-columns"] = "auto",
    fit: Fit | None = None,
) -> bool:
    """Whether every layer's confidence band is within a fraction `tolerance` of its trend.

    Looked at whenever the samples have grown by a quarter, so that an interrupted run stops where a whole one does.
    """
    steps, mark = {16}, 16
    while mark < found.samples:
        mark = -(-mark * 5 // 4)
        steps.add(mark)
    if not any(found.samples - batch_size < s <= found.samples for s in steps):
        return False
    fits = (_fit(s, family, fit, bootstraps=60) for s in found.layers.values())
    return bool(found.layers) and all(f.band.width <= (1 + tolerance) ** 2 for f in fits)


def to_curve(
    found: Observations,
    layer: int,
    *,
    family: Family | Literal["rows-columns"] = "auto",
    fit: Fit | None = None,
    origin: Origin | None = None,
    beside: bool = True,
) -> Curve:
    """The curve of observations.

    Args:
        found: the observations.
        layer: where to fit; the first observed layer if it was not observed.
        family: see `fit_curve`.
        fit: see `fit_curve`.
        origin: what is known of the model and data.
        beside: fit the other observed layers, too, and put their trends into the curve.
    """
    main = layer if layer in found.layers else next(iter(found.layers), layer)
    stats = found.stats(main)
    fitted = _fit(stats, family, fit)
    others = {k: _fit(v, family, fit, bootstraps=2).trend for k, v in found.layers.items() if beside and k != main}
    filled = replace(
        origin or Origin(),
        architecture=found.architecture,
        method=str(found.method["method"]),
        layer=main,
        target=found.target,
        grid=stats.grid,
        data_hash=hash_data(found.digests),
        samples=stats.samples,
    )
    summary = {**fitted.summary, **{k: m.value for k, m in found.measures(main).items()}}
    return Curve(
        trend=fitted.trend,
        origin=filled,
        fit=fitted.fit,
        summary=summary,
        samples=fitted.samples,
        band=fitted.band,
        layers=dict(sorted(others.items())),
        images=tuple(sorted(set(found.digests))),
    )


def _fit(stats: LayerStats, family: Family | Literal["rows-columns"], fit: Fit | None, **options: Any) -> Fitted:
    if family != "rows-columns":
        return fit_curve(stats.profile(), family=family, fit=fit, **options)
    _, count, logs = stats.map
    if not stats.profile().positive:
        raise CurveError("a rows-columns trend is fitted to mean logs, but some scores are not positive")
    fitted = fit_curve(stats.profile(), fit="geometric", **options)  # its band says how sure the trend over x is
    return replace(fitted, trend=fit_rows_columns(logs / np.maximum(count, 1), count), family=family)


def _known(model: nn.Module) -> Origin:
    """What a model says of itself, for who calibrates in Python and says nothing."""
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return Origin(model=name_of(model), revision=str(commit or ""), data="samples given in Python")


def name_of(model: nn.Module) -> str:
    """The name or path that a model was loaded by."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))
