"""What the explorer computes and draws, without its page."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from evengaze import demo
from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.auto import CURVES, automatic, embedded_curve
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.evaluate.uploads import picture_of
from evengaze.explore import draw
from evengaze.explore.findings import METHODS, Choice, Explorer
from evengaze.methods import parse


@pytest.fixture(scope="module")
def explorer():
    return Explorer(Predictor.load(ModelSpec("demo")))


@pytest.fixture(scope="module")
def scene():
    return demo.make_dataset("eval", 1)[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_three_answers(explorer, scene, method):
    found = explorer.find(scene.image, scene.questions[0].text, Choice(method, keep=0.3))
    assert found.dense.trace.average_tokens() == 196 > found.plain.trace.average_tokens()
    assert (found.debiased is None) == (not found.plain.pruner.ranked_stages(10))
    for run in (found.plain, found.debiased):
        if run is not None:
            assert run.seconds > 0 and run.trace.stages[-1].rows[0].survivors < 196
    shown = draw.panel("plain", found.plain, found)
    assert shown.count("<img alt=") == max(1, len(found.plain.trace.stages))
    assert f"{found.plain.trace.average_tokens():.1f}" in shown and "kB of 3135" in shown
    assert "<svg" in draw.charts(found) and "Score map" in draw.maps(found)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_all_tokens_is_all_of_them(explorer, method):
    pruner = explorer.pruner(Choice(method, keep=1.0), 196)
    assert pruner.size_after(0, 196, 196) == 196


def test_each_control_changes_what_it_says(explorer, scene):
    def kept(**changes):
        found = explorer.find(scene.image, scene.questions[0].text, Choice(**changes))
        return found, [set(run.trace.kept().tolist()) for run in (found.plain, found.debiased)]

    base, (plain, debiased) = kept()
    assert len(plain) == len(debiased) == 49 and plain != debiased
    _, (fewer, _) = kept(keep=0.1)
    assert len(fewer) == 20 and fewer < plain
    later, (other, _) = kept(layer=5)
    assert other != plain and later.plain.trace.stages[0].layer == 5
    for steps in ("padding", "trend"):
        one, (same, changed) = kept(steps=steps)
        assert same == plain and changed != debiased
        assert (one.debias.trend is None) == (steps == "padding")
        assert ("No trend" in draw.charts(one)) == (steps == "padding")
    assert base.debias.trend is not None and not base.note


def test_what_was_answered_is_remembered(explorer, scene):
    first = explorer.find(scene.image, "what shape is red?", Choice(keep=0.2))
    again = explorer.find(scene.image, "what shape is red?", Choice(keep=0.4))
    assert again.dense is first.dense and again.plain is not first.plain


def test_wrong_words_and_numbers_are_sentences(explorer, scene):
    for question, expected in (("  ", "type a question"), ("x" * 501, "at most 500"), ("a <image>?", "<image>")):
        with pytest.raises(DataError, match=expected):
            explorer.find(scene.image, question, Choice())
    with pytest.raises(ConfigError, match="outside the model"):
        explorer.find(scene.image, "what?", Choice(layer=40))
    for wrong in ({"method": "os:path"}, {"keep": 0.0}, {"keep": 1.01}, {"steps": "all"}):
        with pytest.raises(ConfigError):
            Choice(**wrong)


def test_answers_are_shown_as_text(explorer, scene, monkeypatch):
    found = explorer.find(scene.image, scene.questions[0].text, Choice())
    object.__setattr__(found.plain, "answer", "<script>alert(1)</script>")
    assert "<script>" not in draw.panel("<b>", found.plain, found) and "<b>" not in draw.panel(
        "<b>", found.plain, found
    )


def test_ticks_are_round():
    assert draw._ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert draw._ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert draw._ticks(0, 211.7) == [0, 50, 100, 150, 200]


def test_the_embedded_curves_are_the_embedded_models():
    for path in CURVES.glob("*.json"):
        curve = embedded_curve(path.stem)
        assert curve.origin.method == path.stem and curve.origin.architecture == "llava/llama/10x576"
        assert {curve.origin.layer, *curve.layers} >= set(range(9))  # by layer 9 nothing is ranked
    known = {path.stem for path in CURVES.glob("*.json")}
    assert known == {"fastv", "himap", "pyramiddrop", "sparsevlm", "tokencarve"}


def test_automatic_debiasing():
    demo_model = {"source": "demo", "architecture": "llava/llama/10x576", "layers": 10}
    llava = {"source": "llava-hf/llava-1.5-7b-hf", "architecture": "llava/llama/32x4096", "layers": 32}
    assert automatic(parse("random:keep=4"), **demo_model) is None
    assert automatic(parse("fastv:layer=4"), **demo_model).trend == embedded_curve("fastv").at_layer(3)
    assert automatic(parse("fastv"), **llava).origin.data.endswith("(llava-1.5-7b/fastv)")
    other = automatic(parse("fastv:layer=9"), **llava)
    assert other.trend is None and other.padding is not None  # no curve is known for that layer


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (b"GIF89a", "no picture"),
    ],
)
def test_uploads_that_are_no_pictures(data, expected):
    with pytest.raises(DataError, match=expected):
        picture_of(data)


def test_uploads_are_measured_before_they_are_decoded(monkeypatch):
    from io import BytesIO

    buffer = BytesIO()
    Image.new("RGB", (3000, 2000)).save(buffer, "PNG")
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    with pytest.raises(DataError, match=re.escape("3000 x 2000 pixels, more than the 5,999,999")):
        picture_of(buffer.getvalue(), pixels=5_999_999)
    assert not decoded
