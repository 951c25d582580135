"""What is collected from a method's scores at one layer: sums, and a few measures of each sample."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evengaze.calibration.means import GROUPS, Array, Profile, floored_log
from evengaze.calibration.measures import sample_measures
from evengaze.debias.debias import Debias
from evengaze.debias.padding import PaddingMask
from evengaze.errors import CurveError
from evengaze.layout import VisualTokens
from evengaze.protocol import top_allowed

MAX_POSITIONS = 1024
"""Larger grids share positions, so that the sums do not grow with the number of tokens."""


class LayerStats:
    """Sums over samples of the scores at one layer.

    Attributes:
        grid: rows and columns of the first picture's frames; the heat map has this shape.
        samples: samples added.
        before: measures of each sample's plain ranking.
        after: measures with debiasing, if there is any.
        debiased: statistics of the debiased scores, if there are any; tokens that may not be chosen are left out.
        floored: scores of content that were below the floor of their logs (see `FLOOR`).
        positions: positions of the raster that are told apart.
        sums: (groups, positions) sums of scores, of their logs and of ones; of padding under the names with "pad_".
        map: (3, rows, columns) sums of scores, of ones and of logs, padding left out.
        frames: (2, frames) sums of scores and of ones, padding left out.
    """

    _SUMS = ("total", "logs", "count", "pad_total", "pad_logs", "pad_count")

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid, self.samples, self.floored = grid, 0, 0
        self.positions = min(MAX_POSITIONS, grid[0] * grid[1])
        self.sums = {name: np.zeros((GROUPS, self.positions)) for name in self._SUMS}
        self.map = np.zeros((3, *grid))
        self.frames = np.zeros((2, 0))
        self.before: list[dict[str, tuple[float, float]]] = []
        self.after: list[dict[str, tuple[float, float]]] = []
        self.debiased: LayerStats | None = None

    def add(
        self,
        sample: int,
        tokens: VisualTokens,
        score: Tensor,
        budget: int,
        *,
        target: str = "attention",
        debias: Debias | None = None,
    ) -> None:
        """Add one sample.

        Args:
            sample: its number, from 0; decides its group.
            tokens: its n visual tokens.
            score: (n,) its raw scores.
            budget: how many the method would keep.
            target: "attention" adds the scores, "frequency" whether each token would be kept.
            debias: also measure the ranking with this.
        """
        valid = PaddingMask().valid(tokens)
        kept = _best(score, torch.ones_like(valid), budget)
        self.before.append(sample_measures(score, tokens, kept))
        if debias is not None:
            better, allowed = debias(score, tokens)
            self.after.append(sample_measures(better, tokens, _best(better, allowed, budget)))
            self.debiased = self.debiased or LayerStats(self.grid)
            scores, chosen = better.detach().double().cpu().numpy(), allowed.cpu().numpy()
            content = valid.cpu().numpy()
            self.debiased._add(sample % GROUPS, tokens.to("cpu"), scores, content & chosen, chosen & ~content)
        values = score.detach().double().cpu().numpy()
        if target == "frequency":  # of the content: padding would take places that a debiased ranking gives to others
            kept = _best(score, valid, budget)
            values = np.zeros(len(values))
            values[kept.cpu().numpy()] = 1.0
        self._add(sample % GROUPS, tokens.to("cpu"), values, valid.cpu().numpy(), ~valid.cpu().numpy())

    def _add(
        self,
        group: int,
        tokens: VisualTokens,
        values: Array,
        content: NDArray[np.bool_],
        padding: NDArray[np.bool_],
    ) -> None:
        x = tokens.x.numpy()
        place = np.minimum((x * self.positions + 1e-9).astype(int), self.positions - 1)
        for prefix, who in (("", content), ("pad_", padding)):
            if not who.any():
                continue
            logs, low = floored_log(values[who])
            for name, what in (("total", values[who]), ("logs", logs), ("count", np.ones(who.sum()))):
                np.add.at(self.sums[prefix + name][group], place[who], what)
            self.floored += 0 if prefix else low
        grids = np.array([i.grid for i in tokens.images])[tokens.image.numpy()]
        row, column = np.divmod(tokens.cell.numpy(), grids[:, 1])
        row, column = row * self.grid[0] // grids[:, 0], column * self.grid[1] // grids[:, 1]
        np.add.at(self.map[0], (row[content], column[content]), values[content])
        np.add.at(self.map[1], (row[content], column[content]), 1)
        if content.any():
            np.add.at(self.map[2], (row[content], column[content]), floored_log(values[content])[0])
        frame = tokens.frame.numpy()
        missing = int(frame.max()) + 1 - self.frames.shape[1]
        if missing > 0:
            self.frames = np.pad(self.frames, ((0, 0), (0, missing)))
        np.add.at(self.frames[0], frame[content], values[content])
        np.add.at(self.frames[1], frame[content], 1)
        self.samples += 1

    def profile(self, *, padding: bool = False) -> Profile:
        """Mean scores per position, of the content or of the padding.

        Raises:
            CurveError: nothing was added.
        """
        if self.samples == 0:
            raise CurveError("no sample with visual tokens was seen")
        prefix = "pad_" if padding else ""
        used = (self.sums["count"] + self.sums["pad_count"]).any(1)
        total, logs, count = (self.sums[prefix + n][used] for n in ("total", "logs", "count"))
        x = np.arange(self.positions) / self.positions
        return Profile(x, total, logs, count, 0 if padding else self.floored, self.samples)

    def heat_map(self) -> Array:
        """(rows, columns) mean score of the content of each cell; NaN where there was only padding."""
        return np.asarray(np.where(self.map[1] > 0, self.map[0] / np.maximum(self.map[1], 1), np.nan))

    def by_frame(self) -> Array:
        """(frames,) mean score of the content of each frame."""
        return np.asarray(self.frames[0] / np.maximum(self.frames[1], 1))

    # -- files ------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """The exact state as JSON-able values."""
        arrays = {**self.sums, "map": self.map, "frames": self.frames}
        return {
            "grid": list(self.grid),
            "samples": self.samples,
            "floored": self.floored,
            "before": [{k: list(v) for k, v in m.items()} for m in self.before],
            "after": [{k: list(v) for k, v in m.items()} for m in self.after],
            "debiased": None if self.debiased is None else self.debiased.to_dict(),
            "arrays": {k: _pack(v) for k, v in arrays.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerStats:
        """The inverse of `to_dict`.

        Raises:
            CurveError: something is missing or malformed.
        """
        try:
            stats = cls((int(values["grid"][0]), int(values["grid"][1])))
            stats.samples, stats.floored = int(values["samples"]), int(values["floored"])
            for name in ("before", "after"):
                setattr(stats, name, [{k: (v[0], v[1]) for k, v in m.items()} for m in values[name]])
            if values.get("debiased") is not None:
                stats.debiased = cls.from_dict(values["debiased"])
            arrays = {k: _unpack(v) for k, v in values["arrays"].items()}
            stats.sums = {name: arrays[name].reshape(GROUPS, stats.positions) for name in cls._SUMS}
            stats.map = arrays["map"].reshape(3, *stats.grid)
            stats.frames = arrays["frames"].reshape(2, -1)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CurveError(f"malformed calibration state ({error!r}); delete it and start again") from None
        return stats


def _best(score: Tensor, allowed: Tensor, budget: int) -> Tensor:
    """(m,) indices of the `budget` best tokens, or of all that may be kept if these are fewer, as methods do."""
    return top_allowed(score, allowed, min(budget, int(allowed.sum())))


def _pack(array: Array) -> str:
    """Little-endian float64 as base64: exact, and a third of the size of decimal digits."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f8").tobytes()).decode("ascii")


def _unpack(text: str) -> Array:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").astype(np.float64)
