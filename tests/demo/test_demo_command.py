"""`evengaze demo` from end to end, on the shipped model: the main job, with its numbers."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from evengaze.cli import main

pytestmark = pytest.mark.slow

QUESTIONS = 100
DENSE = 0.88
"""Floor of the dense model's accuracy."""
LOSS = 0.15
"""What FastV, debiased, may lose with an eighth of the tokens."""
GAIN = 0.08
"""By how much it is better than plain FastV, and than random tokens, at least."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The figures of one run, its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(["demo", "--limit", str(QUESTIONS), "--out", str(out / "report"), "--json", str(out / "figures.json")])
    assert not stop.value.code
    return json.loads((out / "figures.json").read_text()), out / "report", printed.getvalue()


def cell(figures, keep, debias="none", baseline=None, layer=2):
    """One setting."""
    wanted = (keep, debias, baseline, layer)
    (found,) = (c for c in figures["cells"] if (c["keep"], c["debias"], c["baseline"], c["layer"]) == wanted)
    return found


def test_the_model_answers(demo):
    figures, folder, printed = demo
    assert figures["questions"] == QUESTIONS
    assert f"parameters, {figures['dtype']}" in printed
    assert f"computed in {figures['dtype']}" in (folder / "report.html").read_text(encoding="utf-8")
    assert figures["dense"]["accuracy"] >= DENSE
    assert figures["dense"]["average_tokens"] == 196


def test_an_eighth_of_the_tokens_is_enough_if_they_are_chosen_well(demo):
    figures, _, _ = demo
    both = cell(figures, 0.125, "both")["accuracy"]
    assert both >= figures["dense"]["accuracy"] - LOSS
    assert cell(figures, 0.125, baseline="random")["accuracy"] <= both - GAIN


def test_debiasing_helps_where_the_ranking_is_biased(demo):
    figures, _, _ = demo
    for keep in (0.125, 0.06):
        gain = cell(figures, keep, "both")["against_plain"]
        assert gain["delta"] >= GAIN and gain["low"] > 0
    bias = {layer["layer"]: layer for layer in figures["bias"]}
    assert bias[1]["sigma"] > 1 > abs(bias[0]["sigma"])  # layer 1 ranks before layer 2, layer 0 before layer 1


def test_every_setting_drops_as_many_tokens(demo):
    figures, _, _ = demo
    for keep in (0.25, 0.125, 0.06):
        tokens = [c["average_tokens"] for c in figures["cells"] if (c["keep"], c["layer"]) == (keep, 2)]
        assert len(tokens) == 6 and max(tokens) == pytest.approx((2 * 196 + 8 * round(keep * 196)) / 10)
        assert min(tokens) > 0.9 * max(tokens)  # a very long picture has fewer tokens than the budget


def test_pruning_saves_time(demo):
    figures, _, _ = demo
    assert cell(figures, 0.06, "both")["seconds"] < 0.75 * figures["dense"]["seconds"]


def test_the_last_line_says_where_the_report_is(demo):
    _, folder, printed = demo
    assert printed.strip().splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert {p.name for p in folder.iterdir()} == {"report.html", "results.json"} | {
        f"{name}.{ending}" for name in ("kept", "trend", "accuracy") for ending in ("png", "pdf", "svg")
    }
