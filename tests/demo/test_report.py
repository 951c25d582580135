"""The demo's tables, JSON and page, from an experiment with made-up answers."""

from __future__ import annotations

import json
import re

import pytest
import torch

from evengaze.debias import Curve, Exponential
from evengaze.debias.curve import Origin, Samples
from evengaze.demo import make_dataset
from evengaze.demo.experiment import EXAMPLES, KEEPS, Answers, Calibration, Example, Experiment, Trial, settings
from evengaze.demo.report import headline, rows, to_dict, wilson, write
from evengaze.layout import ImageInfo as Info
from evengaze.layout import VisualLayout, VisualTokens
from evengaze.trace import RowTrace, StageTrace, Trace

LABELS = ["plain", "+ trend", "+ padding", "both", "random", "uniform"]


def trace(kept):
    tokens = VisualTokens.build(torch.arange(196), [Info((14, 14))])
    row = RowTrace(torch.arange(196), torch.tensor(kept))
    return Trace(
        {"method": "fastv"},
        VisualLayout((tokens,)),
        210,
        [StageTrace(2, "previous", [row])],
        [210] * 10,
        [0] * 10,
        [1] * 10,
    )


@pytest.fixture(scope="module")
def result():
    pictures = make_dataset("eval", 12)
    questions = [q for p in pictures for q in p.questions]

    def outcome(right, tokens):
        answers = {q.question_id: q.answer if i < right * len(questions) else "?" for i, q in enumerate(questions)}
        return Answers(answers, [tokens] * len(questions), 2.0)

    share = dict(zip(LABELS, (0.5, 0.7, 0.6, 0.8, 0.4, 0.45), strict=True))
    cells = [(cell, outcome(share[cell.label], 196 * cell.keep)) for cell in settings()]
    curve = Curve(
        Exponential(2.0),
        Origin(method="fastv", layer=1),
        "geometric",
        {"sigma": 2.0},
        Samples(),
        layers={0: Exponential(0.5)},
    )
    bias = [
        {"layer": 0, "sigma": 0.1, "r2": 0.0, "spearman": 0.1},
        {"layer": 1, "sigma": 2.0, "r2": 0.7, "spearman": 0.8},
    ]
    examples = [Example(p, p.questions[0], trace([0, 1]), trace([5, 195]), 0) for p in pictures[:EXAMPLES]]
    return Experiment(questions, outcome(0.9, 196.0), cells, Calibration(curve, bias, 12, 1.5), examples)


def test_every_budget_has_every_setting():
    cells = settings()
    assert len(cells) == len(set(cells)) == 22
    for keep in KEEPS:
        assert [c.label for c in cells if (c.keep, c.layer) == (keep, 2)] == LABELS
    assert [c.label for c in cells if c.layer == 1] == ["plain", "both", "random", "uniform"]


def test_the_pruners_are_what_the_labels_say():
    curve = Curve(Exponential(2.0), Origin(layer=1))
    assert Trial(0.25).pruner(curve).debias is None
    trend, padding, both = (Trial(0.25, d).pruner(curve).debias for d in ("trend", "padding", "both"))
    assert trend.trend == curve.trend and trend.padding is None
    assert padding.trend is None and padding.padding is not None
    assert both.trend == curve.trend and both.padding is not None
    early = Trial(0.25, "both", layer=1).pruner(Curve(Exponential(2.0), Origin(layer=1), layers={0: Exponential(0.5)}))
    assert (early.layer, early.debias.trend) == (1, Exponential(0.5))
    blind = Trial(0.25, baseline="uniform").pruner(curve)
    assert (blind.name, blind.keep, blind.layer, blind.debias) == ("uniform", 0.25, 2, None)


def test_wilson_interval():
    low, high = wilson(0.9, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)  # e.g. statsmodels' proportion_confint
    for count in range(1, 120):
        for right in range(count + 1):
            low, high = wilson(right / count, count)
            assert 0 <= low <= right / count <= high <= 1
    assert wilson(0.0, 10)[0] == 0 and wilson(1.0, 10)[1] == pytest.approx(1)


def test_differences_are_paired(result):
    dense, *cells = rows(result)
    assert dense.cell is None and dense.against_dense is None
    for row in cells:
        assert row.ci95[0] < row.accuracy < row.ci95[1]
        assert row.against_dense.delta == pytest.approx(row.accuracy - dense.accuracy)
        assert (row.against_plain is None) == (row.cell.label == "plain")
        if row.cell.label == "both":
            assert row.against_plain.losses == 0 and row.against_plain.low > 0


def test_json_has_the_promised_keys(result):
    found = json.loads(json.dumps(to_dict(result, 3.0), allow_nan=False))
    assert {"dense", "questions", "seconds", "cells", "bias"} <= set(found)
    assert found["questions"] == len(result.questions) and found["seconds"] == 3.0
    assert found["dtype"] == "float32"
    assert found["dense"]["accuracy"] == pytest.approx(0.9, abs=0.03)
    wanted = {"method", "layer", "keep", "debias", "baseline", "accuracy", "ci95", "average_tokens", "seconds"}
    for cell in found["cells"]:
        assert wanted <= set(cell) and cell["layer"] in (1, 2) and len(cell["ci95"]) == 2
        assert cell["debias"] in ("none", "trend", "padding", "both")
        assert cell["baseline"] in (None, "random", "uniform")
    assert [layer["layer"] for layer in found["bias"]] == [0, 1]
    types = found["dense"]["accuracy_by_type"]
    assert set(types) == {q.type for q in result.questions}


def test_the_page_is_self_contained(result, tmp_path):
    page = write(result, tmp_path / "out", 12.0)
    text = page.read_text(encoding="utf-8")
    assert {p.name for p in page.parent.iterdir()} == {"report.html", "results.json"} | {
        f"{name}.{ending}" for name in ("kept", "trend", "accuracy") for ending in ("png", "pdf", "svg")
    }
    assert text.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', text)
    for label in LABELS:
        early = label not in ("+ trend", "+ padding")
        assert text.count(f"<td>{label}</td>") == len(KEEPS) + early
    assert headline(result).replace("+", "&#x2B;") in text or headline(result) in text


def test_the_headline_says_which_way_it_went(result):
    assert "better" in headline(result)
    turned = Experiment(
        result.questions,
        result.dense,
        [
            (c, result.outcome(c.keep, {"plain": "both", "both": "plain"}.get(c.label, c.label)))
            for c, _ in result.cells
        ],
        result.calibration,
        [],
    )
    assert "worse" in headline(turned)
