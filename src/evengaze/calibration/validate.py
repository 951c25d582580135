"""Whether a curve corrects too much or too little on pictures that it has not seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

from torch import nn

from evengaze.calibration.conclude import MARGIN
from evengaze.calibration.measures import Measure
from evengaze.calibration.observe import Sample, observe
from evengaze.debias.curve import Curve, CurveWarning
from evengaze.debias.debias import Debias
from evengaze.methods.base import Pruner


@dataclass(frozen=True)
class Verdict:
    """How a curve does on held-out pictures.

    Attributes:
        before: measures of the plain ranking.
        after: measures of the debiased ranking.
        finding: "even", "over-corrects", "under-corrects", "no bias" (there was none to correct), or "too few samples"
            (a single one has no interval, and one of which nothing but padding is kept has no index).
        overlap: held-out pictures that the curve was calibrated on.
    """

    before: dict[str, Measure]
    after: dict[str, Measure]
    finding: str
    overlap: int


def validate(
    curve: Curve,
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    method: Pruner,
    **options: Any,
) -> Verdict:
    """Debias held-out pictures with a curve and say whether it corrects too much or too little.

    Warns (`CurveWarning`) if it does, if the curve is of another model, layer or method, and if pictures are among
    those that it was calibrated on.

    What is not described here is as in `observe`; the method's budget is the one that is judged.

    Args:
        curve: the curve.
        options: further arguments of `observe`.
    """
    debias = Debias.of(curve)
    found = observe(model, processor, samples, method, debias=debias, **options)
    layer = next(iter(found.layers), 0)
    debias.check(architecture=found.architecture, method=method.name, layer=layer)
    before, after = found.measures(layer), found.measures(layer, after=True)
    finding = judge(before, after)
    overlap = len(set(curve.images) & set(found.digests))
    if finding.endswith("corrects"):
        one = after["kept_index"]
        warnings.warn(
            f"the curve {finding} on these {found.samples} samples: kept tokens have a mean index of {one.value:.3f} "
            f"[{one.low:.3f}, {one.high:.3f}], even is {one.even:.3f}. Calibrate on pictures and prompts like these, "
            "or with another family or fit.",
            CurveWarning,
            stacklevel=2,
        )
    if overlap:
        warnings.warn(
            f"{overlap} of these pictures were used to calibrate the curve; the check is too kind",
            CurveWarning,
            stacklevel=2,
        )
    return Verdict(before, after, finding, overlap)


def judge(before: Mapping[str, Measure], after: Mapping[str, Measure], margin: float = MARGIN) -> str:
    """In a word or two, what debiasing did to the mean index of the kept tokens."""
    was, now = before.get("kept_index"), after.get("kept_index")
    if was is None or now is None or any(isnan(edge) for one in (was, now) for edge in (one.low, one.high)):
        return "too few samples"
    if not now.biased or abs(now.value - now.even) <= margin:
        return "even" if was.biased and abs(was.value - was.even) > margin else "no bias"
    if (now.value > now.even) == (was.value > was.even) and was.biased:
        return "under-corrects"
    return "over-corrects"
