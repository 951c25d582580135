"""Faults that cost a wrong note or number rather than a crash, each with its whole kind."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks import BENCHMARKS, get_benchmark
from evengaze.evaluate.benchmarks.mmbench import MMBench, rotations
from evengaze.evaluate.benchmarks.xlsx import LONGEST, read_xlsx, write_xlsx
from evengaze.evaluate.scoring import score_file
from runner_fakes import save_pope

EVAL = "playground/data/eval"
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def data(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden, tmp_path / "data"))


# -- byte order marks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("mme", f"{EVAL}/MME/answers/gold.jsonl"),
        ("mmbench", f"{EVAL}/mmbench/answers/mmbench_dev_20230712/gold.jsonl"),
        ("pope", f"{EVAL}/pope/answers/gold.jsonl"),
        ("textvqa", f"{EVAL}/textvqa/answers/gold.jsonl"),
        ("scienceqa", f"{EVAL}/scienceqa/answers/gold.jsonl"),
        ("gqa", f"{EVAL}/gqa/answers/llava_gqa_testdev_balanced/gold/merge.jsonl"),
        ("mmvet", f"{EVAL}/mm-vet/answers/gold.jsonl"),
        ("msvd_qa", "eval/GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA/gold/merge.jsonl"),
    ],
)
def test_a_byte_order_mark_at_any_files_start_changes_nothing(data: Path, name: str, answers: str) -> None:
    found = next(iter(data.glob(answers)), None)
    assert found is not None, sorted(str(p.relative_to(data)) for p in (data / answers).parent.parent.rglob("*.jsonl"))
    wanted = score_file(name, found, data).to_dict()
    keys = [record.key for record in get_benchmark(name).records(data)]
    for path in data.rglob("*"):
        if path.suffix in (".jsonl", ".json", ".txt", ".tsv"):
            path.write_bytes(BOM + path.read_bytes())
    assert score_file(name, found, data).to_dict() == wanted
    assert [record.key for record in get_benchmark(name).records(data)] == keys


# -- MMBench -----------------------------------------------------------------------------------------------------------
def turned(options: str, fixed: str = "") -> list[dict[str, Any]]:
    rows = []
    for turn in range(len(options)):
        texts = options[turn:] + options[:turn] + fixed
        rows.append(dict(zip("ABCD", texts, strict=False)))
    return rows


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (turned("wxyz"), 4),
        (turned("wxyz")[:3], 4),
        (turned("xy"), 2),
        (turned("xyz", "n"), 3),  # "All above are not right" stays where it is: complete with three
        (turned("xyz", "n")[:2], 3),
        (turned("wxyz")[:1], 4),
        ([{"A": "x", "B": "x", "C": "y"}, {"A": "x", "B": "y", "C": "x"}], 3),
        (turned("xyx", "n"), 3),  # as question 1211 of the published table
        ([{"A": "x", "B": "y"}, {"A": "p", "B": "q"}], 2),
    ],
)
def test_rotations_that_a_question_needs(rows: list[dict[str, Any]], wanted: int) -> None:
    assert rotations(rows) == wanted


def table(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    names = [
        "index",
        "question",
        "hint",
        *"ABCD",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    writer = csv.DictWriter(text, names, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"question": "Which?", "answer": "A", "image": "aGk=", "split": "dev", **row} for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MMBench.table).write_text(text.getvalue())


def test_a_complete_table_with_fixed_options_has_no_note(tmp_path: Path) -> None:
    rows = [{"index": 7 + turn * 1_000_000, **row} for turn, row in enumerate(turned("xyz", "n"))]
    table(tmp_path / "mmbench", rows)
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps({"question_id": row["index"], "text": "A"}) + "\n" for row in rows))
    assert not any("rotations" in note for note in score_file("mmbench", answers, tmp_path).notes)
    table(tmp_path / "mmbench", rows[:2])
    answers.write_text("".join(json.dumps({"question_id": row["index"], "text": "A"}) + "\n" for row in rows[:2]))
    assert any("1 questions lack rotations" in note for note in score_file("mmbench", answers, tmp_path).notes)


def test_cells_that_no_spreadsheet_holds_are_cut_and_named(tmp_path: Path) -> None:
    rows = [{"index": i, **row} for i, row in enumerate(turned("xy"))]
    table(tmp_path / "mmbench", rows)
    answers, out = tmp_path / "a.jsonl", tmp_path / "s.xlsx"
    texts = ["A\ud800\ufffe\x00", "\U0001f415" * LONGEST]
    lines = [{"question_id": i, "text": text} for i, text in enumerate(texts)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = get_benchmark("mmbench").write_submission(answers, tmp_path, out)
    assert written["cut"] == ["1"]
    found = [row["prediction"] for row in read_xlsx(out, ("index", "prediction"))]
    assert found == ["A   ", "\U0001f415" * (LONGEST // 2)]
    assert write_xlsx(tmp_path / "t.xlsx", ["a"], [["x" * LONGEST]]) == []


# -- files that can stand in for others --------------------------------------------------------------------------------
def test_mme_scores_from_the_evaluation_tools_folder_and_says_that_it_is_enough(data: Path, tmp_path: Path) -> None:
    answers = data / EVAL / "MME/answers/gold.jsonl"
    wanted = score_file("mme", answers, data)
    tree = data / EVAL / "MME/MME_Benchmark_release_version"
    benchmark = get_benchmark("mme")
    truth = benchmark.truth(data)  # type: ignore[attr-defined]
    for subtask in {name[0] for name in truth}:
        rows = [f"{f[:-4]}.jpg\t{q}\t{a}\n" for (s, f, q), a in truth.items() if s == subtask]
        folder = tmp_path / "alone/eval_tool/Your_Results"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{subtask}.txt").write_text("".join(rows))
    shutil.rmtree(tree)
    with pytest.raises(DataError, match=r"eval_tool/Your_Results does as well"):
        score_file("mme", answers, data)
    assert score_file("mme", answers, tmp_path / "alone").value == wanted.value


def test_pope_scores_without_the_question_file_where_the_answers_prompts_fit(tmp_path: Path) -> None:
    root = save_pope(tmp_path)
    folder = root / EVAL / "pope"
    rows = [json.loads(line) for line in (folder / "llava_pope_test.jsonl").read_text().splitlines()]
    answers = tmp_path / "a.jsonl"
    lines = [{"question_id": r["question_id"], "prompt": r["text"], "text": "Yes"} for r in rows]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = score_file("pope", answers, root)
    for path in (folder / "coco").iterdir():
        labels = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"question_id": i, **r}) + "\n" for i, r in enumerate(labels, 1)))
    (folder / "llava_pope_test.jsonl").unlink()
    found = score_file("pope", answers, root)
    assert (found.value, found.per_record) == (wanted.value, wanted.per_record)
    assert get_benchmark("pope").missing_files(root, "score") == []
    for broken in (
        [{**line, "prompt": "What is this?"} for line in lines],
        [{key: value for key, value in line.items() if key != "prompt"} for line in lines],
    ):
        answers.write_text("".join(json.dumps(line) + "\n" for line in broken))
        with pytest.raises(DataError, match=r"llava_pope_test\.jsonl is missing"):
            score_file("pope", answers, root)


def test_labels_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    root = save_pope(tmp_path)
    path = root / EVAL / "pope/coco/coco_pope_random.json"
    labels = [json.loads(line) for line in path.read_text().splitlines()]
    labels.append({**labels[0], "label": "no" if labels[0]["label"] == "yes" else "yes"})
    path.write_text("".join(json.dumps(row) + "\n" for row in labels))
    rows = [json.loads(line) for line in (root / EVAL / "pope/llava_pope_test.jsonl").read_text().splitlines()]
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps({"question_id": r["question_id"], "text": "Yes"}) + "\n" for r in rows))
    notes = score_file("pope", answers, root).notes
    assert any("say both yes and no" in note and labels[0]["image"] in note for note in notes)


def test_mme_truths_that_contradict_each_other_are_an_error(data: Path) -> None:
    (subtask, file, question), answer = next(iter(get_benchmark("mme").truth(data).items()))  # type: ignore[attr-defined]
    (path, *_) = (data / EVAL / "MME/MME_Benchmark_release_version" / subtask).rglob(file)
    other = "No" if answer.strip().lower() == "yes" else "Yes"
    path.write_text(path.read_text().rstrip("\n") + f"\n{question}\t{other}\n")
    with pytest.raises(DataError, match=r"with 'Yes' and with 'No'|with 'No' and with 'Yes'"):
        score_file("mme", data / EVAL / "MME/answers/gold.jsonl", data)


# -- own questions -----------------------------------------------------------------------------------------------------
def own(folder: Path, rows: list[Any], truth: list[Any] | None = None) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if truth is not None:
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truth))
    return folder


GOOD = {"question_id": 1, "image": "a.png", "text": "?"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "text": None}, "text is 'None'"),
        ({**GOOD, "text": 3}, "text is '3'"),
        ({**GOOD, "image": 7}, "image is '7'"),
        ({**GOOD, "image": ["a.png"]}, "image is"),
        ({**GOOD, "question_id": None}, "question_id is 'None'"),
        ({**GOOD, "question_id": True}, "question_id is 'True'"),
        ({**GOOD, "question_id": 1.5}, "question_id is '1.5'"),
        ({**GOOD, "question_id": {}}, "question_id is"),
    ],
)
def test_a_row_of_the_wrong_kind_is_named_before_anything_is_answered(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    folder = own(tmp_path, [{**GOOD, "question_id": 0}, row], [])
    with pytest.raises(DataError, match=message) as caught:
        list(get_benchmark("questions").records(folder))
    assert "row 2" in str(caught.value)


def test_ids_that_stand_twice_are_named_before_anything_is_answered(tmp_path: Path) -> None:
    folder = own(tmp_path, [GOOD, {**GOOD, "question_id": "1"}])
    with pytest.raises(DataError, match=r"stand twice \(1\)"):
        list(get_benchmark("questions").records(folder))


def test_truths_that_contradict_each_other_are_named_before_anything_is_answered(tmp_path: Path) -> None:
    truth = [{"question_id": 1, "answer": "cat"}, {"question_id": 1, "answer": "dog"}]
    folder = own(tmp_path, [GOOD], truth)
    with pytest.raises(DataError, match="answers question 1 twice, and differently"):
        get_benchmark("questions").check(folder)
    own(tmp_path, [GOOD], [truth[0], {"question_id": 1, "answer": ["Cat"]}])
    assert get_benchmark("questions").check(folder) == []


def test_missing_answers_are_told_before_anything_is_answered(tmp_path: Path) -> None:
    folder = own(tmp_path, [GOOD, {**GOOD, "question_id": 2}])
    (note,) = get_benchmark("questions").check(folder)
    assert "answers.jsonl is missing" in note and "dense model" in note
    own(tmp_path, [GOOD, {**GOOD, "question_id": 2}], [{"question_id": 2, "answer": "x"}])
    (note,) = get_benchmark("questions").check(folder)
    assert "1 questions have no answer" in note
    own(tmp_path, [GOOD], [{"question_id": 9, "answer": "x"}])
    with pytest.raises(DataError, match="answers none of the questions"):
        get_benchmark("questions").check(folder)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "questions"])
def test_files_that_only_scoring_needs_are_checked_before_anything_is_answered(data: Path, name: str) -> None:
    benchmark = get_benchmark(name)
    needed = [item for item in benchmark.files if item.needed in ("score", "both")]
    if benchmark.server is not None or not needed:
        pytest.skip("a server scores it")
    target = benchmark.root(data) / needed[-1].path
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    for item in benchmark.files:  # the golden data has no media
        if item.kind == "dir" and item is not needed[-1]:
            (benchmark.root(data) / item.path).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DataError, match=r"cannot (run|score): missing"):
        benchmark.check(data)
