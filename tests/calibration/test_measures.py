"""Measures of bias on rankings whose bias is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from evengaze.calibration.means import Profile
from evengaze.calibration.measures import NAMES, bottom, padding_ratio, sample_measures, spearman, summarise
from evengaze.layout import VisualLayout, VisualTokens


def row(grid: int = 10, size: tuple[int, int] | None = None) -> VisualTokens:
    sizes = None if size is None else [size]
    return VisualLayout.from_spans([(0, grid * grid)], (grid, grid), image_sizes=sizes).rows[0]


def rank(trend: float, tokens: VisualTokens, seeds: int = 60, keep: int = 20) -> list[dict[str, tuple[float, float]]]:
    found = []
    for seed in range(seeds):
        noise = torch.randn(len(tokens), generator=torch.Generator().manual_seed(seed))
        score = torch.exp(trend * tokens.x + noise)
        found.append(sample_measures(score, tokens, score.argsort(descending=True)[:keep].sort().values))
    return found


def test_an_unbiased_ranking_is_even_and_a_biased_one_is_not() -> None:
    even, biased = summarise(rank(0.0, row())), summarise(rank(3.0, row()))
    assert not any(m.biased for m in even.values()), even
    assert {n for n, m in biased.items() if m.biased and m.value > m.even} == {"spearman", "kept_bottom", "kept_index"}
    assert biased["kept_bottom"].even == 0.5 and biased["kept_index"].even == pytest.approx(0.495)
    assert "even 0.500" in str(biased["kept_bottom"])


def test_padding_is_judged_against_its_share() -> None:
    tokens = row(10, (50, 100))  # 5 of 10 columns are padding: 3 + 3 lines, cut at a half
    found = summarise(rank(0.0, tokens))
    assert not found["kept_padding"].biased and found["kept_padding"].even == pytest.approx(0.4)
    greedy = torch.where(tokens.padding > 0.5, 10.0, 1.0) + 0.01 * torch.rand(100)
    one = sample_measures(greedy, tokens, greedy.topk(20).indices)
    assert one["kept_padding"][0] == 1.0 and "kept_bottom" not in one
    assert "kept_padding" not in summarise(rank(0.0, row()))
    assert set(found) <= set(NAMES)


def test_the_middle_row_counts_half() -> None:
    assert bottom(row(3)).tolist() == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]
    two = VisualLayout.from_spans([[(0, 2), (2, 6)]], [(2, 1), (2, 2)]).rows[0]
    assert bottom(two).tolist() == [0, 1, 0, 0, 1, 1]


def test_the_padding_ratio_is_matched_by_position() -> None:
    random = np.random.RandomState(0)
    x = np.arange(50) / 50
    scores = np.exp(3 * x) * np.exp(0.2 * random.randn(40, 50))
    pad = np.zeros((40, 50), bool)
    pad[::2, 40:] = True  # at the end, where the trend is high
    both = [Profile.from_scores(scores, m) for m in (~pad, pad)]
    fair = padding_ratio(*both)
    assert fair is not None and not fair.biased and abs(fair.value - 1) < 0.1
    sink = padding_ratio(*(Profile.from_scores(np.where(pad, 3 * scores, scores), m) for m in (~pad, pad)))
    assert sink is not None and sink.biased and abs(sink.value - 3) < 0.3
    assert padding_ratio(both[0], Profile.from_scores(scores, np.zeros_like(pad))) is None


def test_spearman_is_scipys() -> None:
    random = np.random.RandomState(1)
    a, b = random.randint(0, 9, 50), random.randn(50)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(np.ones(5), np.arange(5)) == 0.0


def test_one_sample_has_no_interval() -> None:
    found = summarise(rank(0.0, row(), seeds=1))
    assert np.isnan(found["spearman"].low) and not found["spearman"].biased
