"""Default mode: joined by key, problems left out and named; official mode differs where upstream has a quirk."""

from __future__ import annotations

import json
import random
from pathlib import Path

import openpyxl
import pytest
from golden_helpers import done_keys

from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks import BENCHMARKS, OfficialError, Record, ScoreOptions, get_benchmark
from evengaze.evaluate.benchmarks.pope import align
from evengaze.evaluate.metrics.mmbench import RULES, circular_hits
from evengaze.evaluate.metrics.soft_accuracy import evalai_accuracy, vqa_accuracy
from evengaze.evaluate.scoring import score_file

EVAL = "playground/data/eval"
ANSWERS = {
    "gqa": "gqa/answers/llava_gqa_testdev_balanced/gold/merge.jsonl",
    "scienceqa": "scienceqa/answers/gold.jsonl",
    "textvqa": "textvqa/answers/gold.jsonl",
    "pope": "pope/answers/gold.jsonl",
    "mme": "MME/answers/gold.jsonl",
    "mmbench": "mmbench/answers/mmbench_dev_20230712/gold.jsonl",
    "mmbench_cn": "mmbench_cn/answers/mmbench_dev_cn_20231003/gold.jsonl",
}


def shuffled(source: Path, target: Path, seed: int) -> Path:
    lines = source.read_text().splitlines(keepends=True)
    random.Random(seed).shuffle(lines)
    target.write_text("".join(lines))
    return target


@pytest.mark.parametrize("name", ANSWERS)
def test_default_equals_official_on_a_clean_file_and_ignores_order(golden: Path, tmp_path: Path, name: str) -> None:
    answers = golden / EVAL / ANSWERS[name]
    official = score_file(name, answers, golden, "official")
    default = score_file(name, answers, golden)
    assert default.value == pytest.approx(official.value, abs=1e-9)
    assert default.official == {"value": official.value, "error": None, "differs": False}
    assert default.complete and default.n_scored == default.n_records
    other = score_file(name, shuffled(answers, tmp_path / "s.jsonl", 5), golden)
    assert other.value == pytest.approx(default.value, abs=1e-9)
    assert other.per_record == default.per_record


@pytest.mark.parametrize("name", ANSWERS)
def test_every_missing_prediction_is_named_and_never_counts_as_wrong(golden: Path, tmp_path: Path, name: str) -> None:
    full = score_file(name, golden / EVAL / ANSWERS[name], golden)
    lines = (golden / EVAL / ANSWERS[name]).read_text().splitlines(keepends=True)
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(lines[: len(lines) * 2 // 3]))
    part = score_file(name, answers, golden)
    assert part.problems.missing and not part.complete
    assert part.n_scored < part.n_records
    assert part.per_record.items() <= full.per_record.items()


@pytest.mark.parametrize("name", [n for n in BENCHMARKS if not n.endswith("_val") and n != "questions"])
def test_keys_are_unique_and_found_again_in_answer_records(golden: Path, name: str) -> None:
    benchmark = get_benchmark(name)
    records = list(benchmark.records(golden))
    keys = [record.key for record in records]
    assert len(set(keys)) == len(keys)
    answers = [benchmark.answer_record(record, "x", "model") for record in records]
    assert done_keys(benchmark, [json.loads(json.dumps(answer)) for answer in answers]) == keys
    wanted = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert all(wanted <= answer.keys() for answer in answers)
    assert len({answer["answer_id"] for answer in answers}) == len(answers)


def test_answer_records_score_like_upstreams(golden: Path, tmp_path: Path) -> None:
    """An answer file written from our records scores like the official run's with the same texts."""
    for name, path in ANSWERS.items():
        benchmark = get_benchmark(name)
        official = [json.loads(line) for line in (golden / EVAL / path).read_text().splitlines()]
        texts = dict(zip(done_keys(benchmark, official), (row["text"] for row in official), strict=True))
        answers = tmp_path / f"{name}.jsonl"
        rows = [benchmark.answer_record(r, texts[r.key], "m") for r in benchmark.records(golden) if r.key in texts]
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ours = score_file(name, answers, golden, "official").value
        assert ours == score_file(name, golden / EVAL / path, golden, "official").value


# -- POPE --------------------------------------------------------------------------------------------------------------


def rows(*questions: tuple[int, str, str]) -> list[dict[str, object]]:
    return [{"question_id": i, "image": image, "text": f"{text}\nAnswer."} for i, image, text in questions]


def labels(*entries: tuple[str, str, str]) -> list[dict[str, object]]:
    return [{"image": image, "text": text, "label": label} for image, text, label in entries]


def test_pope_labels_of_another_selection_are_found_by_image_and_wording() -> None:
    questions = rows((1, "a.jpg", "cat?"), (2, "a.jpg", "dog?"), (3, "b.jpg", "car?"))
    moved = labels(("b.jpg", "car?", "no"), ("a.jpg", "cat?", "yes"), ("a.jpg", "bus?", "no"), ("a.jpg", "dog?", "yes"))
    truth, notes = align(questions, moved, "random")
    assert truth == {"1": "yes", "2": "yes", "3": "no"}
    assert "do not line up (4 labels, 3 questions)" in notes[0]


def test_pope_respelled_question_is_taken_by_position_only_when_the_rest_lines_up() -> None:
    questions = rows(*((i, f"{i}.jpg", "cat?") for i in range(20)))
    there = [(f"{i}.jpg", "cat?", "yes") for i in range(20)]
    there[7] = ("7.jpg", "kat?", "no")
    truth, notes = align(questions, labels(*there), "popular")
    assert truth["7"] == "no" and "1 by position" in notes[0]
    truth, notes = align(questions, labels(*there[7:], *there[:7]), "popular")
    assert "7" not in truth and "1 not at all" in notes[0]


def test_pope_contradicting_labels_are_not_used() -> None:
    contradiction = labels(("x.jpg", "?", "no"), ("a.jpg", "cat?", "no"), ("a.jpg", "cat?", "yes"))
    truth, _ = align(rows((1, "a.jpg", "cat?")), contradiction, "random")
    assert truth == {}


# -- MME ---------------------------------------------------------------------------------------------------------------


def test_mme_reads_result_folders_and_the_tools_own_truth(golden: Path, tmp_path: Path) -> None:
    answers = golden / EVAL / ANSWERS["mme"]
    wanted = score_file("mme", answers, golden).value
    out = tmp_path / "MME/eval_tool/Your_Results"
    score_file("mme", answers, golden, submission=out)
    assert score_file("mme", out, tmp_path).value == wanted
    assert score_file("mme", answers, tmp_path).value == wanted


def test_mme_tab_and_newline_in_answers_are_harmless_by_default(golden: Path) -> None:
    folder = golden / EVAL / "MME/answers"
    wanted = score_file("mme", folder / "gold.jsonl", golden)
    for name in ("gold_tab_in_answer", "gold_newline_in_answer"):
        got = score_file("mme", folder / f"{name}.jsonl", golden)
        assert got.complete and got.official["error"].startswith("ValueError")
        assert len(got.per_record) == len(wanted.per_record)


def test_mme_has_no_total_over_an_absent_subtask(golden: Path) -> None:
    score = score_file("mme", golden / EVAL / "MME/answers/gold_no_ocr.jsonl", golden)
    assert score.value is None and score.metrics["cognition"]["total"] is not None
    assert any("OCR" in note for note in score.notes)


# -- MMBench -----------------------------------------------------------------------------------------------------------


def test_mmbench_scores_its_own_submission_without_the_table(golden: Path, tmp_path: Path) -> None:
    answers = golden / EVAL / ANSWERS["mmbench_cn"]
    wanted = score_file("mmbench_cn", answers, golden)
    out = tmp_path / "out.xlsx"
    score_file("mmbench_cn", answers, golden, submission=out)
    assert score_file("mmbench_cn", out, tmp_path).value == wanted.value
    assert score_file("mmbench_cn", out, golden).value == wanted.value
    upload = tmp_path / "mmbench_cn/answers_upload/mmbench_dev_cn_20231003/run.xlsx"
    score_file("mmbench_cn", answers, golden, submission=upload)
    assert score_file("mmbench_cn", answers, tmp_path).value == wanted.value
    (tmp_path / "bad.xlsx").write_text("no spreadsheet")
    with pytest.raises(DataError, match=r"bad\.xlsx is not a readable xlsx"):
        score_file("mmbench_cn", tmp_path / "bad.xlsx", tmp_path)


def test_mmbench_submission_keeps_text_that_looks_like_a_formula(golden: Path, tmp_path: Path) -> None:
    answers, out = tmp_path / "a.jsonl", tmp_path / "out.xlsx"
    answers.write_text(json.dumps({"question_id": 105, "prompt": "", "text": "=1+1\x07"}) + "\n")
    get_benchmark("mmbench").write_submission(answers, golden, out)
    sheet = openpyxl.load_workbook(out)["Sheet1"]
    cell = next(row[6] for row in sheet.iter_rows(min_row=2) if row[0].value == 105)
    assert cell.value == "=1+1 " and cell.data_type == "s"


def test_mmbench_rules_agree_on_bare_letters_and_differ_elsewhere() -> None:
    choices = {"A": "a dog", "B": "cat", "C": "two", "D": "none of these"}
    for letter in choices:
        assert {rule(letter, choices) for rule in RULES.values()} == {letter}
    assert {name: rule("(B) cat", choices) for name, rule in RULES.items()} == {
        "letter": None,
        "vlmevalkit": "B",
        "lmms-eval": "B",
    }
    # The article, unless an option of that letter is meant.
    assert RULES["vlmevalkit"]("A man with two hats", choices) == "C"
    assert RULES["vlmevalkit"]("A cat", choices) == "A"
    assert RULES["lmms-eval"]("It is A cat I think", choices) == "B"
    assert RULES["vlmevalkit"]("Cannot determine the answer", choices) == "Z"


def test_circular_needs_every_rotation_and_the_first_row() -> None:
    truth = {5: "A", 1000005: "B", 7: "C", 1000009: "A"}
    assert circular_hits({5: "A", 1000005: "B", 7: None, 1000009: "A"}, truth) == {5: 1, 7: 0}
    assert circular_hits({5: "A", 1000005: "C"}, truth) == {5: 0}


def test_mmbench_unknown_rule(golden: Path) -> None:
    with pytest.raises(ConfigError, match="vlmevalkit"):
        score_file("mmbench", golden / EVAL / ANSWERS["mmbench"], golden, options=ScoreOptions(rule="gpt"))


# -- VQA accuracy ------------------------------------------------------------------------------------------------------


def test_soft_accuracy_by_number_of_matches() -> None:
    for matches, credit in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
        assert evalai_accuracy("Red.", answers) == pytest.approx(credit)
    # Where all agree the official comparison is raw.
    assert vqa_accuracy("Red.", ["red"] * 10) == 0
    assert vqa_accuracy("Red.", ["red"] * 9 + ["Red"]) == 1


def test_vqa_val_needs_a_complete_file_in_official_mode(golden: Path, tmp_path: Path) -> None:
    folder = golden / EVAL / "vqav2/offline_val"
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(lines[1:]))
    score = score_file("vqav2_val", answers, folder)
    assert len(score.problems.missing) == 1 and score.official["error"] == "AssertionError"
    with pytest.raises(OfficialError):
        score_file("vqav2_val", answers, folder, "official")


def test_val_records_have_llavas_prompts(golden: Path) -> None:
    record = next(get_benchmark("vqav2_val").records(golden / EVAL / "vqav2/offline_val"))
    assert isinstance(record, Record)
    assert record.prompt.endswith("?\nAnswer the question using a single word or phrase.")
    assert record.image is not None and record.image.name.startswith("COCO_val2014_000000")  # type: ignore[union-attr]
    vizwiz = next(get_benchmark("vizwiz_val").records(golden / EVAL / "vizwiz/offline_val"))
    assert "respond with 'Unanswerable'" in vizwiz.prompt and vizwiz.question_id == 0


def test_server_benchmarks_have_no_value_and_say_where_to_upload(golden: Path) -> None:
    path = golden / EVAL / "vqav2/answers/llava_vqav2_mscoco_test-dev2015/gold/merge.jsonl"
    score = score_file("vqav2", path, golden)
    assert score.value is None and "eval.ai" in score.notes[0]
