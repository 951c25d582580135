"""The table over many settings: what is asked, going on where it was stopped, and what the table says."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from evengaze.demo import load, make_dataset
from evengaze.demo.experiment import Answers, ask, calibration_samples
from evengaze.schedule import Schedule

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "demo_matrix.py"


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("demo_matrix", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_matrix"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_matrix"]


@pytest.fixture(scope="module")
def loaded():
    return load()


def command(out, questions, *more):
    small = ["--layers", "1", "--keeps", "0.06", "--calibration", "4", "--workers", "1", "--dtype", "float32"]
    return ["--part", "layers", "--out", str(out), "--questions", str(questions), *small, *more]


def lines(out):
    return (out / "layers/answers-0.jsonl").read_text().splitlines()


def test_it_goes_on_where_it_was_stopped(matrix, tmp_path, capsys):
    matrix.main(command(tmp_path, 2))
    path = tmp_path / "layers/answers-0.jsonl"
    first = lines(tmp_path)
    assert len(first) == 7 * 2
    path.write_text("\n".join([*first[:-1], first[-1][:20]]))  # killed while it wrote the last line
    matrix.main(command(tmp_path, 2))
    again = lines(tmp_path)
    assert again[: len(first) - 1] == first[:-1]
    assert again[len(first) :] == first[-2:]  # only the batch with the lost answer
    matrix.main(command(tmp_path, 3))
    rows = [json.loads(line) for line in lines(tmp_path) if line.endswith("}")]
    assert {(r["setting"], r["question"]) for r in rows} == {(r["setting"], q) for r in rows for q in range(3)}
    figures = json.loads((tmp_path / "layers/results.json").read_text())
    assert figures["questions"] == 3 and figures["dtype"] == "float32"
    assert (tmp_path / "layers/results.md").read_text() in capsys.readouterr().out


def test_other_settings_do_not_mix(matrix, tmp_path, monkeypatch):
    (tmp_path / "layers").mkdir()
    options = Namespace(part="layers", layers="1", keeps="0.1", methods="", budgets="", calibration=4, dtype="auto")
    asked = {k: v for k, v in vars(options).items() if k != "dtype"}
    stored = {"asked": asked, "weights": matrix.weights(), "dtype": "float32", "settings": []}
    (tmp_path / "layers/settings.json").write_text(json.dumps(stored))
    assert matrix.plan(tmp_path / "layers", options) == stored
    for changed in ({"keeps": "0.2"}, {"calibration": 8}, {"dtype": "bfloat16"}):
        with pytest.raises(SystemExit, match="another --out"):
            matrix.plan(tmp_path / "layers", Namespace(**{**vars(options), **changed}))
    monkeypatch.setattr(matrix, "weights", lambda: "0" * 64)
    with pytest.raises(SystemExit, match="weights"):
        matrix.plan(tmp_path / "layers", options)


def test_methods_are_compared_at_equal_average_tokens(matrix, loaded):
    samples = calibration_samples(make_dataset("calibration", 4))
    options = Namespace(methods="fastv,himap,sparsevlm", budgets="78.4")
    settings = matrix.methods_part(*loaded, samples, options)
    assert [s.label for s in settings] == ["plain", "+ trend", "+ padding", "both"] * 3 + ["random", "uniform"]
    for setting in settings:
        assert Schedule.of(setting.pruner, 10, 196).average == pytest.approx(78.4, abs=1)
        assert setting.pruner.mode == "corrected"
        debias = setting.pruner.debias
        assert (debias is not None and debias.trend is not None) == (setting.label in ("+ trend", "both"))
        assert (debias is not None and debias.padding is not None) == (setting.label in ("+ padding", "both"))
    trends = {str(s.pruner.debias.trend) for s in settings if s.label == "+ trend"}
    assert len(trends) == 3  # each method's own


def test_the_table_pairs_answers_by_question(matrix, tmp_path):
    questions = [q for p in make_dataset("eval", 3) for q in p.questions]
    right = {"dense: dense": 12, "K=1, 6 %: plain": 4, "K=1, 6 %: both": 10}
    with (tmp_path / "answers-0.jsonl").open("w") as file:
        for name, count in right.items():
            for i, q in enumerate(reversed(questions)):
                answer = q.answer if i < count else "?"
                row = {"setting": name, "question": q.question_id, "answer": answer, "tokens": 30.0}
                file.write(json.dumps(row) + "\n")
        file.write('{"setting": "dense: dense", "question": 99')
    pruner = {"method": "dense", "debias": None}
    settings = [dict(zip(("group", "label"), n.split(": "), strict=True), pruner=pruner) for n in right]
    (dense, plain, both), count = matrix.results(tmp_path, {"settings": settings}, 12)
    assert count == 12
    assert (dense["accuracy"], plain["accuracy"], both["accuracy"]) == (1, 4 / 12, 10 / 12)
    assert plain["against_plain"] is None and dense["against_dense"] is None
    assert (both["against_plain"].wins, both["against_plain"].losses) == (6, 0)
    text = matrix.markdown([dense, plain, both], count, {"asked": {"calibration": 4}, "dtype": "x", "weights": "y"})
    assert "| K=1, 6 % | 30.0 | 33.3 [13.8, 60.9] | 83.3 " in text and "| +50.0 [" in text


def test_a_method_need_not_answer_again(matrix, loaded):
    pictures = make_dataset("eval", 1)
    pruners = {"a": matrix.methods.parse("fastv:keep=12,layer=1"), "b": matrix.methods.parse("fastv:keep=6,layer=1")}
    asked = pictures[0].questions[:1]
    found = {n: o for n, _, o, _ in ask(*loaded, pictures, asked, pruners, skip=lambda name, batch: name == "a")}
    assert set(found) == {"b"}
    total = Answers({7: "red"}, [9.0], 1.0)
    total.add(found["b"])
    assert total.answers == {7: "red", **found["b"].answers}
    assert total.average_tokens == [9.0, (196 + 9 * 6) / 10] and total.seconds > 1
