"""What measures of bias mean: where to rank as it is, where with a curve, and where more pictures are needed."""

from __future__ import annotations

import numpy as np
import pytest

from evengaze.calibration.conclude import Conclusion, keeps_padding, verdict
from evengaze.calibration.measures import BOUNDS, NAMES, Measure, summarise


def place(value: float, half: float = 0.01, even: float = 0.5) -> dict[str, Measure]:
    return {"kept_index": Measure(value, value - half, value + half, even, 50, abs(value - even) > half)}


def padding(kept: float, ratio: float, *, sure: bool = True) -> dict[str, Measure]:
    return {
        "kept_padding": Measure(kept, kept - 0.01, kept + 0.01, 0.25, 50, sure),
        "padding_ratio": Measure(ratio, ratio - 0.1, ratio + 0.1, 1.0, 50, sure),
    }


@pytest.mark.parametrize(
    ("measures", "said"),
    [
        (place(0.505), "even"),
        (place(0.67), "to the bottom"),
        (place(0.40), "to the top"),
        (place(0.55, half=0.1), "unsure"),
        (place(0.515, half=0.005), "even"),  # sure to be off, but by less than matters
        ({}, "unsure"),
    ],
)
def test_verdicts(measures: dict[str, Measure], said: str) -> None:
    assert verdict(measures) == said


def test_less_padding_than_by_chance_is_good_news() -> None:
    assert not keeps_padding(padding(0.04, 0.5)) and not keeps_padding({})
    assert keeps_padding(padding(0.60, 0.9)) and keeps_padding(padding(0.20, 2.0))
    assert not keeps_padding(padding(0.60, 2.0, sure=False))


def test_conclusions_in_words() -> None:
    layers = {0: place(0.5), 1: place(0.67), 2: place(0.68), 3: place(0.69), 4: place(0.53), 5: place(0.6, half=0.2)}
    found = Conclusion.of({**layers, 6: {**place(0.5), **padding(0.6, 1.0)}})
    assert (found.even, found.bottom, found.strong, found.unsure, found.padding) == (
        (0, 6),
        (1, 2, 3, 4),
        (1, 2, 3),
        (5,),
        (6,),
    )
    text = "\n".join(found.sentences())
    assert "Layers 0, 6: even. Rank by them as they are." in text
    assert "Layers 1 to 3: biased towards the bottom of the picture, by 0.19 of it at most. Rank by them with a" in text
    assert "Layer 4: slightly biased towards the bottom" in text and "Layer 5: too few pictures" in text
    assert "Layer 6: padding is taken for content." in text
    after = "\n".join(Conclusion.of({1: place(0.60)}).sentences(debiased=True))
    assert after == "Layer 1: still biased towards the bottom of the picture, by 0.10 of it at most."


@pytest.mark.parametrize("seed", range(5))
def test_intervals_stay_within_what_is_possible(seed: int) -> None:
    random = np.random.default_rng(seed)
    edge = {name: random.choice(BOUNDS[name]) for name in NAMES}
    samples = [{n: (float(np.clip(edge[n] + random.normal(0, 0.4), *BOUNDS[n])), 0.3) for n in NAMES} for _ in range(4)]
    for name, one in summarise(samples).items():
        least, most = BOUNDS[name]
        assert least <= one.low <= one.value <= one.high <= most
