"""What measures of bias mean for somebody who wants to prune: where to rank as it is, and where to use a curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evengaze.calibration.measures import Measure

MARGIN = 0.02
"""A mean kept index that is off by less than this fraction of the raster is as good as even."""
STRONG = 0.05
"""One that is off by more than this has lost much of the picture's top (or bottom)."""
SINK = 1.1
"""Padding that gets this many times the score of content at the same places draws attention as such."""

Leaning = Literal["even", "to the bottom", "to the top", "unsure"]


def verdict(measures: Mapping[str, Measure], margin: float = MARGIN) -> Leaning:
    """Whether the tokens that a ranking keeps are where any content is, by their mean raster index.

    "unsure" if the interval is so wide that it could be off by more than twice the margin.
    """
    one = measures.get("kept_index")
    if one is None:
        return "unsure"
    off = one.value - one.even
    if one.biased and abs(off) > margin:
        return "to the bottom" if off > 0 else "to the top"
    return "even" if max(one.high - one.value, one.value - one.low) <= 2 * margin else "unsure"


def keeps_padding(measures: Mapping[str, Measure]) -> bool:
    """Whether padding is kept more often than by chance, or draws more attention than content at the same places."""
    kept, ratio = measures.get("kept_padding"), measures.get("padding_ratio")
    often = kept is not None and kept.biased and kept.value > kept.even
    return often or (ratio is not None and ratio.biased and ratio.value > SINK)


@dataclass(frozen=True)
class Conclusion:
    """What the layers of a model are like.

    Attributes:
        even: layers whose ranking can be used as it is.
        bottom: layers that prefer the end of the raster.
        top: layers that prefer its beginning.
        unsure: layers that need more pictures to tell.
        padding: layers whose ranking takes padding for content.
        off: by how much the mean kept index is off what is even, for the layers that have one.
    """

    even: tuple[int, ...]
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    unsure: tuple[int, ...]
    padding: tuple[int, ...]
    off: Mapping[int, float]

    @classmethod
    def of(cls, layers: Mapping[int, Mapping[str, Measure]], margin: float = MARGIN) -> Conclusion:
        """From the measures of each layer."""
        found = {layer: verdict(measures, margin) for layer, measures in layers.items()}

        def those(word: Leaning) -> tuple[int, ...]:
            return tuple(layer for layer, said in found.items() if said == word)

        return cls(
            those("even"),
            those("to the bottom"),
            those("to the top"),
            those("unsure"),
            tuple(layer for layer, measures in layers.items() if keeps_padding(measures)),
            {k: m["kept_index"].value - m["kept_index"].even for k, m in layers.items() if "kept_index" in m},
        )

    @property
    def biased(self) -> tuple[int, ...]:
        """Layers that need a curve."""
        return tuple(sorted((*self.bottom, *self.top)))

    @property
    def strong(self) -> tuple[int, ...]:
        """Layers that are biased by more than `STRONG`."""
        return tuple(layer for layer in self.biased if abs(self.off[layer]) > STRONG)

    def sentences(self, *, debiased: bool = False) -> list[str]:
        """In words; of the plain ranking, or of a debiased one."""
        said = []
        if self.even:
            so = "." if debiased else f". Rank by {_it(self.even)} as {_it(self.even, 'it is', 'they are')}."
            said.append(f"{_layers(self.even)}: even{so}")
        for layers, where in ((self.bottom, "bottom"), (self.top, "top")):
            slight = tuple(layer for layer in layers if layer not in self.strong)
            strong = tuple(layer for layer in layers if layer in self.strong)
            for some, how in ((slight, "slightly "), (strong, "")):
                if some:
                    off = max(abs(self.off[layer]) for layer in some)
                    what = "still " if debiased else ""
                    so = (
                        "" if debiased else " A curve changes little." if how else f" Rank by {_it(some)} with a curve."
                    )
                    text = f"{what}{how}biased towards the {where} of the picture, by {off:.2f} of it at most."
                    said.append(f"{_layers(some)}: {text}{so}")
        if self.padding:
            so = "" if debiased else " Leave it out: any curve does, and padding=PaddingMask() alone."
            said.append(f"{_layers(self.padding)}: padding is taken for content.{so}")
        if self.unsure:
            said.append(f"{_layers(self.unsure)}: too few pictures to tell.")
        return said

    def to_dict(self) -> dict[str, list[int]]:
        """JSON-able values."""
        return {name: list(getattr(self, name)) for name in ("even", "bottom", "top", "strong", "unsure", "padding")}


def _it(numbers: tuple[int, ...], one: str = "it", many: str = "them") -> str:
    return one if len(numbers) == 1 else many


def _layers(numbers: tuple[int, ...]) -> str:
    """Such as "Layer 3" or "Layers 0, 2 to 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{'Layers' if len(numbers) > 1 else 'Layer'} {', '.join(words)}"
