"""The two debiasing steps as a pruner uses them: divide the trend out of the scores, leave padding out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evengaze.debias.beyond import SinkMask
from evengaze.debias.curve import Curve, Origin, warn_if_foreign
from evengaze.debias.families import trend_from_dict
from evengaze.debias.padding import PaddingMask
from evengaze.debias.presets import preset, published_trend
from evengaze.debias.trend import Trend
from evengaze.errors import ConfigError, CurveError
from evengaze.layout import VisualTokens
from evengaze.parameters import coerce
from evengaze.spelling import did_you_mean

Stages = Literal["first", "all"]


@dataclass(frozen=True, repr=False)
class Debias:
    """Debiasing of a language-to-vision ranking (arXiv 2508.17807): weights against the trend, a mask against padding.

    Attributes:
        padding: which tokens are padding; None leaves padding in the ranking.
        trend: the trend to divide out; None leaves it in.
        sinks: which tokens are registers; None leaves them in the ranking.
        stages: apply at the "first" stage of a method only, as published, or at "all" that rank by text.
        origin: what the trend was calibrated on, if it was read from a file or a preset.
        curve: all that a curve file says, if the trend is from one; not part of `to_dict`.
    """

    padding: PaddingMask | None = None
    trend: Trend | None = None
    stages: Stages = "first"
    origin: Origin | None = None
    sinks: SinkMask | None = None
    curve: Curve | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        coerce(self)
        if self.trend is not None and not callable(getattr(self.trend, "weights", None)):
            raise ConfigError(
                f"Debias: trend must be a Trend, such as Exponential(1.5), or None, not {self.trend!r:.200}"
            )

    def __repr__(self) -> str:
        return f"<Debias: {self}>"

    def __str__(self) -> str:
        parts = []
        if self.trend is not None:
            known = self.origin is not None and self.origin.place
            parts.append(f"{self.trend.family} trend {known} divided out" if known else f"{self.trend} divided out")
        if self.padding is not None:
            parts.append("padding left out" if self.padding == PaddingMask() else f"{self.padding} left out")
        if self.sinks is not None:
            parts.append(f"registers above {self.sinks.ratio:g} times the median norm left out")
        return "; ".join(parts or ["nothing removed"]) + ("; at all stages" if self.stages == "all" else "")

    def applies(self, stage: int) -> bool:
        """Whether a stage, counted from 0, is debiased."""
        return self.stages == "all" or stage == 0

    def valid(self, tokens: VisualTokens, *, official: bool = False) -> Tensor:
        """(n,) bool, False where a token is padding.

        If nothing but padding is left, all are True, unless `official` asks for what the published code does.
        """
        if self.padding is None:
            return torch.ones(len(tokens), dtype=torch.bool, device=tokens.x.device)
        valid = self.padding.valid(tokens)
        return valid if official or bool(valid.any()) else torch.ones_like(valid)

    def weight(self, tokens: VisualTokens, score: Tensor | None = None) -> Tensor:
        """(n,) float64 weights of the trend step; 1 without a trend. On the CPU for tokens on MPS, without float64."""
        if tokens.x.device.type == "mps":
            tokens, score = tokens.to("cpu"), None if score is None else score.cpu()
        if self.trend is None:
            return torch.ones(len(tokens), dtype=torch.float64, device=tokens.x.device)
        return self.trend.weights(tokens, score)

    def __call__(
        self, score: Tensor, tokens: VisualTokens, *, official: bool = False, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Debias the scores of one prompt's visual tokens.

        Args:
            score: (n,) scores, larger means keep.
            tokens: the n tokens that they belong to.
            official: do as the published patches: padding's score becomes 0 and may still be chosen when too few other
                tokens are there.
            features: (n, d) hidden states of the tokens; only `sinks` looks at them.

        Returns:
            (n,) scores of the type of `score`, and (n,) bool: which tokens may be chosen.
        """
        weight = self.weight(tokens, score).to(score.dtype).to(score.device)
        valid = self.valid(tokens, official=official).to(score.device)
        if official:
            return (score * valid) * weight, torch.ones_like(valid)
        if self.sinks is not None and features is not None:
            without = valid & self.sinks.valid(features).to(valid.device)
            valid = without if bool(without.any()) else valid
        return score * weight, valid

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {
            "padding": None if self.padding is None else self.padding.to_dict(),
            "trend": None if self.trend is None else self.trend.to_dict(),
            "stages": self.stages,
            "sinks": None if self.sinks is None else self.sinks.to_dict(),
            "origin": None if self.origin is None else asdict(self.origin),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Debias:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown parameter, or one of the wrong type or out of range.
            CurveError: the same in the trend or its origin.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a Debias is read from a dictionary, not from {values!r:.80}")
        unknown = set(values) - {"padding", "trend", "stages", "origin", "sinks"}
        if unknown:
            raise ConfigError(f"Debias has no parameter {', '.join(sorted(map(str, unknown)))}")
        for name in ("padding", "trend", "origin", "sinks"):
            if not isinstance(values.get(name), dict | None):
                raise ConfigError(f"Debias: {name} must be a dictionary or None, not {values[name]!r:.80}")
        padding, trend, origin = values.get("padding"), values.get("trend"), values.get("origin")
        sinks = values.get("sinks")
        return cls(
            padding=None if padding is None else PaddingMask.from_dict(padding),
            trend=None if trend is None else trend_from_dict(trend),
            stages=values.get("stages", "first"),
            origin=None if origin is None else Origin.from_dict(origin),
            sinks=None if sinks is None else SinkMask.from_dict(sinks),
        )

    @classmethod
    def load(cls, path: str | Path, *, layer: int | None = None) -> Debias:
        """Both steps with the trend of a curve file (see `Curve.load`).

        Args:
            path: the file.
            layer: take the trend of this layer (0-based, whose attention is read) from a file that holds several.

        Raises:
            CurveError: the file is missing, malformed or of a newer version.
        """
        return cls.of(Curve.load(path), layer=layer)

    @classmethod
    def of(cls, curve: Curve, *, layer: int | None = None) -> Debias:
        """Both steps with the trend of a curve; `layer` as in `load`."""
        origin = replace(curve.origin, fingerprint=curve.fingerprint)
        if layer is None or layer == origin.layer:
            return cls(padding=PaddingMask(), trend=curve.trend, origin=origin, curve=curve)
        origin = replace(origin, layer=layer)
        return cls(padding=PaddingMask(), trend=curve.at_layer(layer), origin=origin, curve=curve)

    @classmethod
    def preset(cls, name: str, *, official: bool = False) -> Debias:
        """Both steps with a published trend, e.g. "llava-1.5-7b/fastv" (see `evengaze.debias.presets`).

        Args:
            name: model/method or model/method/benchmark.
            official: with the published patch's own padding formula instead of measured shares.

        Raises:
            CurveError: there is no such preset.
        """
        found = preset(name)
        return cls(padding=found.padding if official else PaddingMask(), trend=found.trend, origin=found.origin)

    def check(self, *, architecture: str = "", method: str = "", layer: int | None = None) -> list[str]:
        """Warn (`CurveWarning`) if the trend was calibrated for another model, method or layer.

        The warning says how far the trend is off where the right one is known: from the same file, or published.

        Args:
            architecture: of the model in use (`evengaze.debias.curve.architecture_of(model.config)`).
            method: name of the method in use.
            layer: 0-based layer whose attention the method ranks by at its first stage.

        Returns:
            The differences, in words.
        """
        reference = None
        if self.curve is not None and layer is not None and layer != self.curve.origin.layer:
            reference = self.curve.layers.get(layer)
        if reference is None:
            reference = published_trend(architecture, method, layer)
        return warn_if_foreign(
            self.origin, self.trend, architecture=architecture, method=method, layer=layer, reference=reference
        )

    @classmethod
    def parse(cls, text: str) -> Debias:
        """What the command line takes: "padding", a curve file (ends in .json) or a preset's name."""
        if text == "padding":
            return cls(padding=PaddingMask())
        near = did_you_mean(text, ("padding",)) if "/" not in text else ""
        if near:
            raise CurveError(f"debias {text!r}: give padding, a preset's name or a curve file (.json).{near}")
        return cls.load(text) if text.endswith(".json") else cls.preset(text)

    @classmethod
    def by_layer(cls, text: str) -> Debias | dict[int, Debias]:
        """What `parse` takes; of a curve file that holds several layers, the steps of each by its number."""
        if not text.endswith(".json"):
            return cls.parse(text)
        curve = Curve.load(text)
        if not curve.layers or curve.origin.layer is None:
            return cls.of(curve)
        return {layer: cls.of(curve, layer=layer) for layer in (curve.origin.layer, *curve.layers)}
