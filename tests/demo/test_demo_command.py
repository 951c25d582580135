"""`evengaze demo` from end to end, on the shipped model: the main job, with its numbers."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from evengaze.cli import main

pytestmark = pytest.mark.slow

QUESTIONS = 100
DENSE = 0.85
"""Floor of the dense model's accuracy."""
LOSS = 0.10
"""What the debiased model may lose at 12.5 % of the tokens; also the least that random tokens lose to it."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The figures of one run, its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(["demo", "--limit", str(QUESTIONS), "--out", str(out / "report"), "--json", str(out / "figures.json")])
    assert not stop.value.code
    return json.loads((out / "figures.json").read_text()), out / "report", printed.getvalue()


def accuracy(figures, keep, debias="none", baseline=None):
    """Of one cell."""
    wanted = (keep, debias, baseline)
    (cell,) = (c for c in figures["cells"] if (c["keep"], c["debias"], c["baseline"]) == wanted)
    return cell["accuracy"]


def test_the_model_answers(demo):
    figures, _, _ = demo
    assert figures["questions"] == QUESTIONS
    assert figures["dense"]["accuracy"] >= DENSE
    assert figures["dense"]["average_tokens"] == 196


def test_an_eighth_of_the_tokens_is_enough_if_they_are_chosen_well(demo):
    figures, _, _ = demo
    both = accuracy(figures, 0.125, "both")
    assert both >= figures["dense"]["accuracy"] - LOSS
    assert accuracy(figures, 0.125, baseline="random") <= both - LOSS
    assert accuracy(figures, 0.06, baseline="random") <= accuracy(figures, 0.06, "both") - LOSS


def test_every_setting_drops_as_many_tokens(demo):
    figures, _, _ = demo
    for keep in (0.25, 0.125, 0.06):
        tokens = [c["average_tokens"] for c in figures["cells"] if c["keep"] == keep]
        assert len(tokens) == 6 and max(tokens) == pytest.approx((2 * 196 + 8 * round(keep * 196)) / 10)
        assert min(tokens) > 0.9 * max(tokens)  # of very long pictures less than the budget is not padding


def test_pruning_saves_time(demo):
    figures, _, _ = demo
    seconds = {c["keep"]: c["seconds"] for c in figures["cells"] if c["debias"] == "both"}
    assert seconds[0.06] < 0.75 * figures["dense"]["seconds"]


def test_the_trend_is_where_fastv_ranks(demo):
    figures, _, _ = demo
    bias = {layer["layer"]: layer for layer in figures["bias"]}
    assert bias[1]["spearman"] > 0.3 and figures["calibration"]["summary"]["sigma_low"] > 0


def test_the_last_line_says_where_the_report_is(demo):
    _, folder, printed = demo
    assert printed.strip().splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "results.json",
        "kept.png",
        "trend.png",
        "accuracy.png",
    }
