"""run, compare, profile and list on a model in a local folder."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from evengaze import Trace
from evengaze.cli import main
from evengaze.debias import Curve, Exponential


def call(capsys, *arguments):
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


def test_run_answers_and_writes_trace_and_picture(tiny_folder, picture, tmp_path, capsys):
    trace, plot = tmp_path / "trace.json", tmp_path / "kept.png"
    arguments = ["run", "--model", tiny_folder, "-i", picture, "-p", "what is this ?", "-m", "fastv:keep=4,layer=2"]
    arguments += ["--debias", "padding", "--trace", trace, "--plot", plot, "--max-new-tokens", 3]
    code, out, err = call(capsys, *arguments)
    assert code == 0 and out.strip() and "-> 4 at layer 2" in err
    assert len(Trace.load(trace).kept()) == 4
    with Image.open(plot) as drawn:
        assert drawn.width > 2 * drawn.height


def test_a_curve_for_another_model_is_used_with_a_warning(tiny_folder, picture, tmp_path, capsys):
    from evengaze.debias import Origin

    curve = Curve(Exponential(1.0), Origin(architecture="other/model", method="fastv", layer=7)).save(
        tmp_path / "c.json"
    )
    arguments = ["run", "--model", tiny_folder, "-i", picture, "-p", "what ?", "-m", "fastv:keep=4", "--debias", curve]
    code, _, err = call(capsys, *arguments, "--max-new-tokens", 1)
    assert code == 0 and "Warning:" in err and "other/model" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-m", "fastw"], "unknown method"),
        (["-m", "fastv:keep=0"], "keep=0"),
        (["-m", "fastv:layer=99"], "outside the model"),
        (["--debias", "nothing/known"], "nothing/known"),
        (["--debias", "missing.json"], "missing.json"),
        (["--plot", "kept.txt"], "ends in"),
        (["--plot", "no/such/folder/kept.png"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(change, message, tiny_folder, picture, capsys):
    code, _, err = call(capsys, "run", "--model", tiny_folder, "-i", picture, "-p", "what ?", *change)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_budget_that_keeps_everything_is_said(tiny_folder, picture, capsys):
    arguments = ["run", "--model", tiny_folder, "-i", picture, "-p", "what ?", "--max-new-tokens", 2, "-m"]
    for method, said in (("fastv:keep=999", True), ("fastv:keep=4", False), ("dense", False)):
        code, _, error = call(capsys, *arguments, method)
        assert code == 0 and ("nothing was dropped" in error) is said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere"], "is not a directory"),
        (["--baselines", "randm"], "Did you mean 'random'"),
        (["--out", "this file"], "is a file"),
    ],
)
def test_evaluate_loads_no_model_for_what_is_wrong_anyway(change, message, tiny_folder, tmp_path, capsys, monkeypatch):
    from evengaze.evaluate import predictor

    monkeypatch.setattr(predictor, "open_spec", lambda spec: pytest.fail("loaded"))
    folder = tmp_path / "playground/data/eval/questions"
    folder.mkdir(parents=True)
    question = {"question_id": 1, "image": "a.png", "text": "?"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (folder / "answers.jsonl").write_text(json.dumps({"question_id": 1, "answer": "yes"}) + "\n")
    (folder / "images").mkdir()
    given = {"--data": tmp_path, "--out": tmp_path / "out", "--model": tiny_folder, "--benchmarks": "questions"}
    given |= {change[0]: __file__ if change[0] == "--out" else change[1]}
    code, _, error = call(capsys, "evaluate", *(part for pair in given.items() for part in pair))
    assert code == 2 and message in " ".join(error.split())


def test_compare_draws_methods_side_by_side(tiny_folder, picture, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = ["compare", "--model", tiny_folder, "-i", picture, "-p", "what is this ?", "-o", out]
    code, text, _ = call(capsys, *arguments, "-m", "fastv:keep=4,random:keep=4", "--max-new-tokens", 2)
    assert code == 0 and out.stat().st_size > 5000
    assert [line.partition(": ")[0] for line in text.splitlines()] == [
        "all tokens",
        "fastv:keep=4",
        "debiased",
        "random:keep=4",
    ]


def test_profile_reports_ratios_to_dense(tiny_folder, picture, capsys):
    arguments = ["profile", "--model", tiny_folder, "-i", picture, "-m", "fastv:keep=4", "--rounds", 2, "--json"]
    code, out, _ = call(capsys, *arguments)
    dense, pruned = json.loads(out)
    assert code == 0 and dense["method"] == "dense" and dense["time"] == dense["kv_cache"] == dense["flops"] == 1
    assert pruned["flops"] < 1 and pruned["kv_bytes"] < dense["kv_bytes"] and pruned["peak_bytes"] > 0
    code, out, _ = call(capsys, *arguments[:-1])
    assert code == 0 and "fastv:keep=4" in out.replace("\n", "")


def test_lists(capsys):
    for what, wanted in (("methods", "fastv"), ("models", "llava"), ("presets", "llava-1.5-7b/fastv")):
        code, out, _ = call(capsys, "list", what, "--json")
        rows = json.loads(out)
        assert code == 0 and wanted in {row.get("name") for row in rows} | {row.get("model_type") for row in rows}
        assert call(capsys, "list", what)[0] == 0
    assert call(capsys, "list", "benchmarks")[0] == 0
