"""What would have misled without a word: other code under the same name, questions as answers, memory, other models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_faults import Fragile, work
from test_grid import made_up
from test_small_faults import own

from evengaze.cli import main
from evengaze.cli.evaluate import _show
from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.agreement import Agreement, Flip, agree, same_answer
from evengaze.evaluate.benchmarks import get_benchmark
from evengaze.evaluate.figures import curves
from evengaze.evaluate.fingerprint import describe_pruner
from evengaze.evaluate.grid import Plan, cells
from evengaze.evaluate.predictor import ModelSpec, OutOfMemory, Predictor
from evengaze.evaluate.results import CellResult, load, tables
from evengaze.evaluate.runner import Job, LocalBackend, answer_work, run
from evengaze.evaluate.scoring import score_file
from evengaze.evaluate.setting import Setting
from evengaze.methods import parse
from runner_fakes import save_model, save_pope

METHOD = """
from evengaze.methods import OneStage, register

def helper(view):
    return {helper}

@register
class Mine(OneStage):
    name = "changing"
    {version}
    def score(self, view):
        return helper(view) * {factor}
"""


def method_of(folder: Path, factor: str = "1", helper: str = "-view.tokens.x", version: str = "") -> dict[str, Any]:
    """How a method in a file of its own is described, by a process of its own."""
    (folder / "mine.py").write_text(METHOD.format(factor=factor, helper=helper, version=version))
    code = "import mine, json; from evengaze.evaluate.fingerprint import describe_pruner as d; "
    code += "print(json.dumps(d(mine.Mine(keep=4))))"
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_method_from_outside_is_told_by_its_source(tmp_path: Path) -> None:
    first = method_of(tmp_path)
    assert method_of(tmp_path) == first
    assert method_of(tmp_path, factor="2") != first
    assert method_of(tmp_path, helper="view.tokens.x") != first  # what it calls counts as well
    one, same, other = (method_of(tmp_path, f, version=f"version = {v}") for f, v in (("1", 1), ("2", 1), ("1", 2)))
    assert one == same != other  # unless it says its version
    assert "source" not in describe_pruner(parse("fastv:keep=4"))


def test_a_method_without_a_file_is_told_by_its_compiled_functions() -> None:
    from evengaze.evaluate.fingerprint import method_source

    def make(text: str) -> type:
        space: dict[str, Any] = {"__name__": "nowhere"}
        exec(f"class M:\n    def score(self, view):\n        return view * {text}\n", space)
        return space["M"]  # type: ignore[no-any-return]

    assert method_source(make("2")) == method_source(make("2")) != method_source(make("3"))


# -- questions as predictions ------------------------------------------------------------------------------------------
def test_a_question_file_is_no_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = save_pope(tmp_path)
    questions = root / "playground/data/eval/pope/llava_pope_test.jsonl"
    with pytest.raises(DataError, match="holds questions, not answers"):
        score_file("pope", questions, root)
    folder = own(
        tmp_path / "own", [{"question_id": 1, "image": "a.png", "text": "Is it?"}], [{"question_id": 1, "answer": "x"}]
    )
    with pytest.raises(DataError, match="holds questions, not answers"):
        score_file("questions", folder / "questions.jsonl", folder)
    answers = tmp_path / "with_images.jsonl"  # predictions of other programs may name the picture
    answers.write_text(json.dumps({"question_id": 1, "image": "a.png", "text": "x"}) + "\n")
    assert score_file("questions", answers, folder).value == 100


def test_score_says_by_its_exit_status_that_answers_are_missing(tmp_path: Path) -> None:
    rows = [{"question_id": i, "image": "a.png", "text": "?"} for i in range(3)]
    folder = own(tmp_path, rows, [{"question_id": i, "answer": "x"} for i in range(3)])
    given = folder / "given.jsonl"
    for count, status in ((3, None), (2, 3)):
        given.write_text("".join(json.dumps({"question_id": i, "text": "x"}) + "\n" for i in range(count)))
        with pytest.raises(SystemExit) as end:
            main(["score", "questions", "--answers", str(given), "--data", str(folder)])
        assert (end.value.code or None) == status


def test_list_benchmarks_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["list", "benchmarks", "pope", "MME", "--json"])
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == ["pope", "mme"]
    with pytest.raises(SystemExit) as end:
        main(["list", "benchmarks", "nope"])
    assert end.value.code == 2


# -- plans that say more than they do ----------------------------------------------------------------------------------
def test_budgets_without_a_method_are_an_error() -> None:
    for given in (("none",), ("dense", "none"), ()):
        with pytest.raises(ConfigError, match="have no method to bring to them"):
            Plan(given, budgets=(64.0,))


def test_what_a_methods_string_does_not_say_is_said() -> None:
    notes: list[str] = []
    cells(Plan(("fastv:keep=999", "fastv:keep=64", "himap:keep=64", "himap:keep=[64,16]")), "pope", 32, 196, notes)
    assert any("fastv:keep=999: all 196 visual tokens" in note and "nothing is pruned" in note for note in notes)
    assert "himap:keep=64: 64 tokens from layer 2, 16 tokens from layer 8" in notes
    assert len(notes) == 2


def test_more_answers_than_were_asked_for_are_said(tmp_path: Path) -> None:
    data, backend = save_pope(tmp_path / "data"), LocalBackend(Fragile(ValueError(), set()))  # type: ignore[arg-type]
    from evengaze.evaluate.runner import limit_notes

    def outcome(limit: int | None) -> Any:
        return run(Job(get_benchmark("pope"), data, parse("dense"), tmp_path / "out", Setting(limit)), backend)

    assert limit_notes(outcome(6)) == []
    assert limit_notes(outcome(12)) == []
    (note,) = limit_notes(outcome(6))
    assert "12 answers are there from earlier runs" in note and "only the 6" in note


# -- memory ------------------------------------------------------------------------------------------------------------
class Small(Fragile):
    """Holds two records at a time."""

    def answer(self, batch: Any, pruner: Any, **options: Any) -> Any:
        if len(batch) > 2:
            raise OutOfMemory("out of memory")
        return super().answer(batch, pruner, **options)


def test_a_batch_that_memory_does_not_hold_is_split_by_itself() -> None:
    small = Small(ValueError("odd"), {"3"})
    answered = answer_work(small, work(range(8)))  # type: ignore[arg-type]
    assert not isinstance(answered, str)
    assert [p.record.key for p in answered if p.text is not None] == [str(i) for i in range(8) if i != 3]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_every_kind_of_exhausted_memory_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    predictor = Predictor.load(ModelSpec(str(save_model(tmp_path / "model")), device="cpu"))
    complete = predictor.complete

    def exhausted(inputs: Any, *rest: Any, **options: Any) -> Any:
        if len(inputs["input_ids"]) > 1:
            raise error
        return complete(inputs, *rest, **options)

    monkeypatch.setattr(predictor, "complete", exhausted)
    data = save_pope(tmp_path / "data", images=1)
    outcome = run(
        Job(get_benchmark("pope"), data, parse("fastv:keep=4"), tmp_path / "out", Setting(max_new_tokens=2)),
        LocalBackend(predictor),
    )
    assert (len(outcome.answers), outcome.errors, outcome.failed) == (3, {}, False)


# -- agreement ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Yes", "yes.", True),
        ("a dog", "dog", True),
        ("two", "2", True),
        ("", "", True),
        ("", "a", False),
        ("the", "a", False),
    ],
)
def test_what_counts_as_the_same_answer(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same is same_answer(other, one)


def test_agreement_counts_common_questions_and_what_changed() -> None:
    def lines(**texts: str) -> dict[str, dict[str, str]]:
        return {key: {"text": text, "prompt": f"{key}?"} for key, text in texts.items()}

    dense, other = lines(a="yes", b="no", c="cat", d="x"), lines(a="Yes", b="yes", c="dog", e="x")
    found = agree(dense, other, {"b": 1.0, "c": 0.0}, {"b": 0.0, "c": 1.0})
    assert found is not None
    assert (found.count, [flip.key for flip in found.flips], found.won, found.lost) == (3, ["b", "c"], 1, 1)
    assert found.share == pytest.approx(1 / 3)
    assert agree(dense, {"9": {"text": "x"}}, {}, {}) is None


def test_nothing_is_won_or_lost_against_an_answer_of_unknown_worth() -> None:
    """As where the judge gave no verdict on one of the two."""
    for known in ({"dense_credit": 1.0}, {"credit": 1.0}):
        flip = Flip("a", "a?", "yes", "no", **known)
        assert flip.change == 0
        assert (Agreement(1, (flip,)).won, Agreement(1, (flip,)).lost) == (0, 0)


def test_without_labels_answers_are_compared_with_the_dense_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evengaze.demo import write_dataset

    write_dataset(tmp_path / "data", images=8)
    (tmp_path / "data/answers.jsonl").unlink()
    given = [
        "evaluate",
        "--model",
        "demo",
        "--benchmarks",
        "questions",
        "--data",
        str(tmp_path / "data"),
        "--limit",
        "16",
    ]
    with pytest.raises(SystemExit) as end:
        main([*given, "--out", str(tmp_path / "out"), "--methods", "fastv:keep=8", "--baselines", ""])
    shown = capsys.readouterr()
    assert end.value.code == 3  # there is no score
    assert "answers.jsonlismissing" in "".join(shown.err.split())
    (row,) = (row for row in tables(load(tmp_path / "out"))[0].rows if row.cell.role == "method")
    assert row.agreement is not None and row.agreement.count == 16
    assert f"{row.agreement.share:.1%}" in shown.out
    assert row.folder is not None
    flips = [json.loads(line) for line in (row.folder / "flipped.jsonl").read_text().splitlines()]
    assert len(flips) == len(row.agreement.flips) > 0
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "report")])
    assert not end.value.code
    for kind in ("html", "md"):
        text = (tmp_path / f"report/report.{kind}").read_text()
        assert f"{row.agreement.share:.1%}" in text and flips[0]["dense"] in text


# -- results -----------------------------------------------------------------------------------------------------------
def edit(path: Path, **changes: Any) -> None:
    result = json.loads(path.read_text())
    result.update(changes)
    path.write_text(json.dumps(result))


def test_a_renamed_or_copied_cell_is_one_row_and_said(tmp_path: Path) -> None:
    made_up(tmp_path, "pope", "dense", "none", 80.0, "dense")
    made_up(tmp_path, "pope", "fastv:keep=4", "none", 60.0)
    found = next(p for p in tmp_path.rglob("result.json") if "fastv" in str(p))
    for name in ("fastv:keep=4+none", "old"):
        folder = found.parent.parent / name
        folder.mkdir()
        (folder / "result.json").write_text(found.read_text())
    rows = [row for row in load(tmp_path) if row.cell.role == "method"]
    assert len(rows) == 1
    assert rows[0].folder is not None and rows[0].folder.name == "fastv:keep=4+none"
    assert sum("holds the same cell" in note for note in rows[0].notes) == 2


def test_models_in_one_report_are_compared_each_with_its_own_dense_run(tmp_path: Path) -> None:
    for name, dense, pruned in (("small", 40.0, 30.0), ("large", 80.0, 75.0)):
        made_up(tmp_path / name, "pope", "dense", "none", dense, "dense")
        made_up(tmp_path / name, "pope", "fastv:keep=4", "none", pruned)
        for path in (tmp_path / name).rglob("result.json"):
            edit(path, fingerprint={"model": {"name": name, "architecture": "llava"}})
    (table,) = tables(load(tmp_path), resamples=100)
    found = {row.title: row.against_dense for row in table.rows}
    assert set(found) == {f"{name}: {method}" for name in ("small", "large") for method in ("dense", "fastv:keep=4")}
    small, large = found["small: fastv:keep=4"], found["large: fastv:keep=4"]
    assert small is not None and large is not None
    assert (small.delta, large.delta) == (pytest.approx(-0.10), pytest.approx(-0.05))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": None}, "cell must be an object"),
        ({"cell": {}}, r"cell\.name is missing"),
        ({"answered": "many"}, "answered must be a whole number"),
        ({"answered": True}, "answered must be a whole number"),
        ({"errors": {"1": 2}}, r"errors\['1'\] must be a string"),
        ({"score": {"value": "high"}}, r"score\.value must be a number"),
        ({"score": {"value": float("nan"), "per_record": {}, "n_scored": 1, "n_records": 1}}, "NaN"),
        ({"score": {"value": 1.0, "per_record": {"1": None}, "n_scored": 1, "n_records": 1}}, "per_record"),
        ({"tokens": {"average_tokens": [1]}}, "average_tokens"),
    ],
)
def test_a_damaged_result_names_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made_up(tmp_path, "pope", "dense", "none", 80.0, "dense")
    path = next(tmp_path.rglob("result.json"))
    edit(path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        CellResult.load(path)
    assert "result.json" in str(caught.value) and "give the evaluation's command again" in str(caught.value)


def test_the_reports_table_has_categories(tmp_path: Path) -> None:
    made_up(tmp_path, "pope", "dense", "none", 80.0, "dense")
    path = next(tmp_path.rglob("result.json"))
    score = json.loads(path.read_text())["score"]
    edit(path, score={**score, "breakdown": {"adversarial": 79.04, "popular": 81.0}})
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "-o", str(tmp_path / "report")])
    for kind in ("html", "md"):
        text = (tmp_path / f"report/report.{kind}").read_text()
        assert "adversarial" in text and "79.0" in text


@pytest.mark.parametrize("width", [60, 80])
def test_the_terminal_has_categories(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    method = "pyramiddrop:keep=[0.5,0.25,0.125],layers=[2,10,20],mode=official"
    made_up(tmp_path, "mme", "dense", "none", 80.0, "dense")
    made_up(tmp_path, "mme", method, "none", 70.0)
    names = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
    for number, path in enumerate(sorted(tmp_path.rglob("result.json"))):
        score = json.loads(path.read_text())["score"]
        edit(path, score={**score, "breakdown": {n: 100.0 * number + i for i, n in enumerate(names[: 10 - number])}})
    assert _show(load(tmp_path), tmp_path) == 0
    out = capsys.readouterr().out
    shown = out.partition("by category")[2].partition("Results in")[0]
    assert "by category" in shown, "one table would be too wide"
    words = set(shown.split())
    assert {
        *names,
        *(f"{i}.0" for i in range(10)),
        *(f"{100 + i}.0" for i in range(9)),
    } <= words and "109.0" not in words
    assert all(len(line) <= width or line == method for line in shown.splitlines())


def test_a_warning_that_rows_share_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("fastv:keep=4", "fastv:keep=8", "himap:keep=4"):
        made_up(tmp_path, "pope", method, "none", 80.0)
    for path in tmp_path.rglob("result.json"):
        edit(path, notes=["answers of an earlier run count, too"])
    assert _show(load(tmp_path), tmp_path) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("answers of an earlier run") == 1
    assert "Warning: pope fastv:keep=4 and 2 more: answers" in out


def test_a_score_says_its_categories() -> None:
    for name in ("questions", "pope", "mme", "mmbench", "mmvet"):
        assert get_benchmark(name).breakdown.__func__ is not get_benchmark("vqav2").breakdown.__func__  # type: ignore[attr-defined]


# -- figures -----------------------------------------------------------------------------------------------------------
def test_plain_and_debiased_points_differ_in_colour_marker_and_filling(tmp_path: Path) -> None:
    for method, tokens in (("fastv:keep=4", 4.0), ("fastv:keep=8", 8.0), ("himap:keep=4", 4.0)):
        for debias in ("none", "padding", "preset"):
            made_up(tmp_path, "gqa", method, debias, 50.0 + tokens + len(debias))
    for path in tmp_path.rglob("result.json"):
        tokens = float(json.loads(path.read_text())["cell"]["method"][-1])
        edit(path, tokens={"average_tokens": tokens, "relative_flops": 0.4, "visual_tokens": 576})
    figure = curves(tables(load(tmp_path), resamples=100))
    assert figure is not None
    (axis,) = figure.axes
    looks = [(line.get_color(), line.get_marker(), line.get_markerfacecolor(), line.get_linestyle())
             for container in axis.containers for line in [container.lines[0]]]  # fmt: skip
    assert len(looks) == len(set(looks)) == 6
    colours = {str(look[0]) for look in looks}
    assert len(colours) == 4  # two families, each plain and debiased
    plain = [look for look in looks if look[2] == "white"]
    assert len(plain) == 2 and {look[1] for look in plain} == {"o"}
    assert "o" not in {look[1] for look in looks if look[2] != "white"}
    assert all(container.has_yerr for container in axis.containers)


def test_baselines_of_different_first_layers_are_lines_of_their_own_and_intervals_side_by_side(tmp_path: Path) -> None:
    for budget in (4, 8):
        made_up(tmp_path, "gqa", f"fastv:keep={budget}", "none", 50.0 + budget)
        for first in ("", ",layer=1"):
            made_up(tmp_path, "gqa", f"random:keep={budget}{first}", "none", 40.0 + budget, "baseline")
    for path in tmp_path.rglob("result.json"):
        tokens = 4.0 if "keep=4" in json.loads(path.read_text())["cell"]["method"] else 8.0
        edit(path, tokens={"average_tokens": tokens, "relative_flops": 0.4, "visual_tokens": 576})
    figure = curves(tables(load(tmp_path), resamples=100))
    assert figure is not None
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert [len(line.get_xdata()) for line in lines] == [2, 2, 2]
    assert len({float(line.get_xdata()[0]) for line in lines}) == 3
    assert all(abs(float(line.get_xdata()[0]) - 4) < 0.1 for line in lines)
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"random from layer 1", "random from layer 2"} <= names


def test_one_budget_makes_bars(tmp_path: Path) -> None:
    made_up(tmp_path, "gqa", "dense", "none", 80.0, "dense")
    for debias in ("none", "preset"):
        made_up(tmp_path, "gqa", "fastv:keep=4", debias, 60.0)
    figure = curves(tables(load(tmp_path), resamples=100))
    assert figure is not None
    assert len(figure.axes[0].patches) == 2


# -- ending ------------------------------------------------------------------------------------------------------------
def test_sigterm_says_what_is_kept(tmp_path: Path) -> None:
    from evengaze.demo import write_dataset

    write_dataset(tmp_path / "data", images=60)
    command = [sys.executable, "-m", "evengaze", "evaluate", "--model", "demo", "--benchmarks", "questions"]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--batch-size", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and not any(p.stat().st_size for p in tmp_path.rglob("answers-0.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = " ".join(process.communicate(timeout=60)[1].split())
    assert process.returncode == 143
    assert "Terminated. All answers up to here are in" in said and "give the same command again to go on" in said
