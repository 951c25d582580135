"""How biased each layer of a model is, plain and debiased, and what follows from it: what `evengaze bias` reports.

found = observe(model, processor, samples, FastV(layer=2), layers="all")
print(Bias.of(found))
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evengaze.calibration.calibrate import to_curve
from evengaze.calibration.conclude import Conclusion
from evengaze.calibration.fit import fit_curve
from evengaze.calibration.measures import Measure, sigma
from evengaze.calibration.observe import Observations
from evengaze.debias.curve import Curve, CurveWarning, Origin
from evengaze.debias.debias import Debias

Measures = Mapping[int, Mapping[str, Measure]]
"""Measures by 0-based layer and name."""


@dataclass(frozen=True, repr=False)
class Bias:
    """The bias of a method's ranking at the layers that were observed.

    Attributes:
        method: the method's parameters.
        samples: samples that were looked at.
        plain: measures of the plain ranking; `sigma`, of the paper's exponential, and those of `measures.NAMES`.
        debiased: the same of the debiased ranking; empty if none was observed.
        frames: of videos, for each layer, the mean score of each frame relative to all.
        curves: the exponential of each layer.
    """

    method: Mapping[str, Any]
    samples: int
    plain: Measures
    debiased: Measures
    frames: Mapping[int, list[float]]
    curves: Mapping[int, Curve]

    @classmethod
    def of(cls, found: Observations, model: str = "") -> Bias:
        """From observations of a plain ranking, and of a debiased one if there is one.

        Args:
            found: the observations.
            model: what figures call the model; its architecture if left out.
        """
        plain, debiased, frames, curves = {}, {}, {}, {}
        for layer, stats in found.layers.items():
            curves[layer] = to_curve(
                found, layer, family="exponential", fit="log", origin=Origin(model=model), beside=False
            )
            plain[layer] = {"sigma": sigma(curves[layer].summary), **found.measures(layer)}
            if stats.debiased is not None:
                line = fit_curve(stats.debiased.profile(), family="exponential", fit="log", bootstraps=2)
                debiased[layer] = {"sigma": sigma(line.summary), **found.measures(layer, after=True)}
            means = stats.by_frame()
            if len(means) > 1:
                frames[layer] = (means / means.mean()).tolist()
        return cls(found.method, found.samples, plain, debiased, frames, curves)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.plain))
        return f"<Bias of {self.method.get('method', 'a method')}: {self.samples} samples; layers {layers}>"

    def __str__(self) -> str:
        return "\n".join(self.conclusion.sentences())

    @property
    def conclusion(self) -> Conclusion:
        """What the plain ranking is good for."""
        return Conclusion.of(self.plain)

    @property
    def conclusion_debiased(self) -> Conclusion | None:
        """What is left of the bias; None if no debiased ranking was observed."""
        return Conclusion.of(self.debiased) if self.debiased else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values: all measures with their intervals, and the conclusions."""
        layers: dict[str, dict[str, Any]] = {}
        for layer, measures in self.plain.items():
            layers[str(layer)] = {"before": _plain(measures)}
            if layer in self.debiased:
                layers[str(layer)]["after"] = _plain(self.debiased[layer])
            if layer in self.frames:
                layers[str(layer)]["frames"] = self.frames[layer]
        report = {"method": self.method, "samples": self.samples, "layers": layers}
        report["conclusion"] = self.conclusion.to_dict()
        if self.conclusion_debiased is not None:
            report["conclusion_debiased"] = self.conclusion_debiased.to_dict()
        return report


def _plain(measures: Mapping[str, Measure]) -> dict[str, dict[str, float | None]]:
    """JSON has no NaN."""
    return {
        name: {k: None if (v := float(getattr(one, k))) != v else v for k in ("value", "low", "high", "even")}
        for name, one in measures.items()
    }


def warn_of_misuse(steps: Debias | Mapping[int, Debias] | None, found: Observations, method: str) -> None:
    """Warn (`CurveWarning`) where a debiased ranking was measured that says little.

    That is with a curve of another model, method or layer, or on pictures that the curve was calibrated on.

    Args:
        steps: what the ranking was debiased with; one for all layers or one for each.
        found: what was observed.
        method: name of the method.
    """
    one = next(iter(steps.values()), None) if isinstance(steps, Mapping) else steps
    if one is None:
        return
    one.check(architecture=found.architecture, method=method)
    own = None if one.origin is None else one.origin.layer
    others = [str(layer) for layer in found.layers if layer != own]
    if own is not None and others and not isinstance(steps, Mapping):
        text = f"the curve is of layer {own} and used at layers {', '.join(others)}; calibrate with layers='all'"
        warnings.warn(text, CurveWarning, stacklevel=2)
    known = frozenset(() if one.curve is None else one.curve.images)
    seen = sum(digest in known for digest in found.digests)
    if seen:
        text = f"the curve was calibrated on the pictures of {seen} of these {found.samples} samples; give other ones"
        warnings.warn(text, CurveWarning, stacklevel=2)
