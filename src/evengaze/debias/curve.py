"""The file in which a calibrated trend is kept and exchanged: JSON with where it came from and how sure it is."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from evengaze.debias.families import trend_from_dict
from evengaze.debias.trend import TrendCurve, max_log_ratio
from evengaze.errors import CurveError, DataError
from evengaze.files import parse_json, read_text, write_whole
from evengaze.models.base import architecture_of as architecture_of

SCHEMA = 1
_NO_NUMBER = "the curve holds NaN or an infinite number, which JSON does not have. Copy it again, or calibrate anew."


class CurveWarning(UserWarning):
    """A curve is used where it was not calibrated, or corrects too much or too little."""


@dataclass(frozen=True)
class Origin:
    """What a trend was measured on. Empty fields are unknown and never disagree.

    Attributes:
        model: name or path of the model.
        revision: its commit or version.
        architecture: see `architecture_of`.
        method: name of the pruning method whose scores were averaged.
        layer: 0-based decoder layer whose attention the scores come from.
        target: "attention" (mean score) or "frequency" (how often selected).
        grid: rows and columns of visual tokens.
        data: the images and prompts, in words.
        data_hash: SHA-256 over them, so that calibration on evaluation data can be noticed.
        samples: number of calibration samples.
        fingerprint: of the curve file.
    """

    model: str = ""
    revision: str = ""
    architecture: str = ""
    method: str = ""
    layer: int | None = None
    target: str = "attention"
    grid: tuple[int, int] | None = None
    data: str = ""
    data_hash: str = ""
    samples: int = 0
    fingerprint: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Origin:
        """The inverse of `dataclasses.asdict`.

        Raises:
            CurveError: a field is unknown or of the wrong type.
        """
        kinds: dict[str, type | tuple[type, ...]] = {"layer": (int, type(None)), "samples": int}
        kinds["grid"] = (list, tuple, type(None))
        for name, value in values.items():
            if name not in {f.name for f in fields(cls)}:
                raise CurveError(f"unknown field {name!r} in the curve's origin")
            if not isinstance(value, kinds.get(name, str)) or isinstance(value, bool):
                raise CurveError(f"the origin's {name} has the wrong type: {value!r:.80}")
        grid = values.get("grid")
        if grid is not None and (len(grid) != 2 or not all(isinstance(g, int) and g > 0 for g in grid)):
            raise CurveError(f"the origin's grid must be [rows, columns], not {grid!r:.80}")
        return cls(**{**values, "grid": None if grid is None else tuple(grid)})

    @property
    def place(self) -> str:
        """Method, layer and model in words, as far as they are known: "of fastv at layer 1 on demo"."""
        model = self.model or self.architecture
        parts = {"of": self.method, "at layer": "" if self.layer is None else str(self.layer), "on": model}
        return " ".join(f"{word} {value}" for word, value in parts.items() if value)

    def differences(self, *, architecture: str = "", method: str = "", layer: int | None = None) -> list[str]:
        """In words, what differs between the place of use and the calibration."""
        found = []
        if architecture and self.architecture and architecture != self.architecture:
            found.append(f"model {architecture} instead of {self.architecture}")
        if layer is not None and self.layer is not None and layer != self.layer:
            found.append(f"attention of layer {layer} instead of {self.layer} ({abs(layer - self.layer)} layers away)")
        if method and self.method and method != self.method:
            found.append(f"method {method} instead of {self.method}")
        return found


@dataclass(frozen=True)
class Samples:
    """The averages that a trend was fitted to, one entry a position that had any token that is not padding.

    Attributes:
        x: position in the raster, in [0, 1).
        mean: mean score.
        error: standard error of the mean.
        count: number of tokens averaged.
    """

    x: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    error: tuple[float, ...] = ()
    count: tuple[int, ...] = ()


@dataclass(frozen=True)
class Band:
    """Confidence band of f(x) / mean of f, pointwise, by bootstrap over images.

    Attributes:
        level: confidence, e.g. 0.95.
        x: positions in [0, 1].
        low: lower bound.
        high: upper bound.
    """

    level: float = 0.95
    x: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @property
    def width(self) -> float:
        """Largest ratio high / low over x; infinite if a bound is not positive or there is no band."""
        if not self.x or min(self.low) <= 0:
            return float("inf")
        return max(h / w for h, w in zip(self.high, self.low, strict=True))


@dataclass(frozen=True, repr=False)
class Curve:
    """A calibrated trend with its evidence.

    Attributes:
        trend: the fitted curve.
        origin: what it was measured on.
        fit: "least-squares" or "log".
        summary: figures of the fit: mu, sigma and sigma_low/sigma_high of the exponential summary, r2, and others.
        samples: what was fitted.
        band: how sure it is.
        layers: trends of other layers measured in the same pass, by layer.
        images: digests of the pictures that it was calibrated on (`evengaze.calibration.observe.image_digest`), so that
            evaluating on them can be noticed.
    """

    trend: TrendCurve
    origin: Origin = Origin()
    fit: str = ""
    summary: dict[str, float] = field(default_factory=dict)
    samples: Samples = Samples()
    band: Band = Band()
    layers: dict[int, TrendCurve] = field(default_factory=dict)
    images: tuple[str, ...] = ()

    def at_layer(self, layer: int) -> TrendCurve:
        """The trend measured at a layer.

        Raises:
            CurveError: that layer was not measured.
        """
        if layer == self.origin.layer:
            return self.trend
        if layer not in self.layers:
            known = sorted({*self.layers, *([] if self.origin.layer is None else [self.origin.layer])})
            raise CurveError(f"the curve has no trend of layer {layer}, only of {known}; calibrate with layers='all'")
        return self.layers[layer]

    def to_dict(self) -> dict[str, Any]:
        """The artefact as JSON-able values, with its fingerprint."""
        body: dict[str, Any] = {
            "evengaze_curve": SCHEMA,
            "trend": self.trend.to_dict(),
            "fit": self.fit,
            "summary": dict(sorted(self.summary.items())),
            "samples": _plain(asdict(self.samples)),
            "band": _plain(asdict(self.band)),
            "layers": {str(k): v.to_dict() for k, v in sorted(self.layers.items())},
            "images": list(self.images),
            "origin": _plain(asdict(self.origin)),
        }
        body["origin"].pop("fingerprint")
        body["fingerprint"] = _fingerprint(body)
        return body

    def __repr__(self) -> str:
        return f"<Curve {self.fingerprint}: {self}>"

    def __str__(self) -> str:
        parts = [f"{self.trend.family} trend {self.origin.place}".rstrip()]
        if self.origin.samples:
            parts.append(f"{self.origin.samples} samples")
        parts.append(f"f(1)/f(0) = {1 / float(self.trend.weight(torch.ones(1))):.3g}")
        if self.band.x:
            parts.append(f"{100 * self.band.level:g} % band within a factor of {self.band.width:.2f}")
        if self.layers:
            parts.append(f"{len(self.layers)} further layers")
        return "; ".join(parts)

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the artefact's content."""
        return str(self.to_dict()["fingerprint"])

    def save(self, path: str | Path) -> Path:
        """Write the artefact; equal curves give equal bytes."""
        target = Path(path)
        write_whole(target, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Read an artefact.

        Raises:
            CurveError: the file is missing, no JSON, no curve, of a newer schema or damaged.
        """
        source = Path(path)
        try:
            text = read_text(source, f"Make it with `evengaze calibrate ... -o {source}`.")
        except DataError as error:
            raise CurveError(str(error)) from None
        try:
            values = parse_json(text)
        except ValueError as error:
            raise CurveError(f"{source} is no JSON ({error}). Copy it again, or calibrate anew.") from None
        try:
            return cls.from_dict(values)
        except CurveError as error:
            raise CurveError(f"{source}: {error}") from None

    @classmethod
    def from_dict(cls, values: Any) -> Curve:
        """The inverse of `to_dict`.

        Raises:
            CurveError: something is missing, unknown, of the wrong type, or the fingerprint does not match.
        """
        if not isinstance(values, dict) or "evengaze_curve" not in values:
            raise CurveError(
                "not a curve: the key 'evengaze_curve' is missing. Write curves with `evengaze calibrate`."
            )
        schema = values["evengaze_curve"]
        if not isinstance(schema, int) or isinstance(schema, bool) or not 1 <= schema <= SCHEMA:
            raise CurveError(f"curve schema {schema!r:.20}; this evengaze reads up to {SCHEMA}. Upgrade evengaze.")
        missing = {"trend", "origin"} - set(values)
        if missing:
            raise CurveError(f"the curve lacks {', '.join(sorted(missing))}; calibrate anew")
        given = values.get("fingerprint")
        body = {k: v for k, v in values.items() if k != "fingerprint"}
        try:
            own = _fingerprint(body)
        except ValueError:
            raise CurveError(_NO_NUMBER) from None
        if given is not None and given != own:
            raise CurveError(
                "the content does not match its fingerprint: the file was edited or damaged. Calibrate anew, or remove "
                "the key 'fingerprint' if you changed it on purpose."
            )
        if not isinstance(values["origin"], dict):
            raise CurveError("the curve's origin must be an object")
        origin = Origin.from_dict(values["origin"])
        try:
            result = cls(
                trend=_curve(values["trend"]),
                origin=origin,
                fit=str(values.get("fit", "")),
                summary={str(k): float(v) for k, v in values.get("summary", {}).items()},
                samples=Samples(**{k: tuple(v) for k, v in values.get("samples", {}).items()}),
                band=_band(values.get("band", {})),
                layers={int(k): _curve(v) for k, v in values.get("layers", {}).items()},
                images=tuple(str(i) for i in values.get("images", ())),
            )
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CurveError):
                raise
            raise CurveError(f"malformed curve: {error}") from None
        _check_columns(result)
        stamped = Origin(**{**asdict(origin), "grid": origin.grid, "fingerprint": result.fingerprint})
        return Curve(**{**{f.name: getattr(result, f.name) for f in fields(result)}, "origin": stamped})


def warn_if_foreign(
    origin: Origin | None,
    trend: Any = None,
    *,
    architecture: str = "",
    method: str = "",
    layer: int | None = None,
    reference: TrendCurve | None = None,
) -> list[str]:
    """Warn (`CurveWarning`) if a trend is used elsewhere than where it was calibrated.

    Args:
        origin: where it was calibrated; None never warns.
        trend: the trend in use.
        architecture: of the model in use, by `architecture_of`.
        method: name of the method in use.
        layer: 0-based layer whose attention it ranks by.
        reference: a trend that fits the place of use, to say how far off this one is.

    Returns:
        The differences, in words.
    """
    if origin is None:
        return []
    found = origin.differences(architecture=architecture, method=method, layer=layer)
    if found:
        distance = ""
        if reference is not None and isinstance(trend, TrendCurve):
            apart = math.exp(max_log_ratio(trend, reference))
            distance = f" Its weights are off by up to a factor of {apart:.2f} there."
        name = origin.fingerprint or origin.data or origin.model
        warnings.warn(
            f"debias curve {name} is used for {'; '.join(found)}. The trend differs between models and layers."
            f"{distance} Check it with `evengaze curves validate`, or calibrate anew.",
            CurveWarning,
            stacklevel=3,
        )
    return found


def hash_data(items: Sequence[bytes | str]) -> str:
    """SHA-256 of images and prompts, whatever their order."""
    digests = sorted(hashlib.sha256(i.encode() if isinstance(i, str) else i).hexdigest() for i in items)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _curve(values: dict[str, Any]) -> TrendCurve:
    trend = trend_from_dict(values)
    if not isinstance(trend, TrendCurve):
        raise CurveError(f"a {trend.family} trend belongs to single samples and is no calibrated curve")
    return trend


def _band(values: dict[str, Any]) -> Band:
    columns: dict[str, Any] = {k: tuple(v) for k, v in values.items() if k != "level"}
    return Band(level=float(values.get("level", 0.95)), **columns)


def _check_columns(curve: Curve) -> None:
    if not all(map(math.isfinite, (*curve.summary.values(), curve.band.level))):  # "nan" is a number to float()
        raise CurveError(_NO_NUMBER)
    for name, table in (("samples", curve.samples), ("band", curve.band)):
        columns = {k: v for k, v in asdict(table).items() if k != "level"}
        if len({len(v) for v in columns.values()}) > 1:
            raise CurveError(f"the columns of {name} differ in length: { {k: len(v) for k, v in columns.items()} }")
        if not all(isinstance(v, (int, float)) and v == v for c in columns.values() for v in c):
            raise CurveError(f"{name} holds something that is no number")


def _fingerprint(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON reads them back."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
