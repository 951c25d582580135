"""Answers in no expected form are noted on every benchmark, and warned about when they are many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evengaze.cli import main
from evengaze.evaluate.benchmarks import BENCHMARKS
from evengaze.evaluate.scoring import score_file

EVAL = "playground/data/eval"
ANSWERS = {
    "vqav2": f"{EVAL}/vqav2/answers/llava_vqav2_mscoco_test-dev2015/gold/merge.jsonl",
    "gqa": f"{EVAL}/gqa/answers/llava_gqa_testdev_balanced/gold/merge.jsonl",
    "vizwiz": f"{EVAL}/vizwiz/answers/gold.jsonl",
    "scienceqa": f"{EVAL}/scienceqa/answers/gold.jsonl",
    "textvqa": f"{EVAL}/textvqa/answers/gold.jsonl",
    "pope": f"{EVAL}/pope/answers/gold.jsonl",
    "mme": f"{EVAL}/MME/answers/gold.jsonl",
    "mmbench": f"{EVAL}/mmbench/answers/mmbench_dev_20230712/gold.jsonl",
    "mmbench_cn": f"{EVAL}/mmbench_cn/answers/mmbench_dev_cn_20231003/gold.jsonl",
    "mmvet": f"{EVAL}/mm-vet/answers/gold.jsonl",
    "msvd_qa": "eval/GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA/gold/merge.jsonl",
}
GOOD = {"pope": "No", "mme": "Yes", "scienceqa": "B", "mmbench": "A", "mmbench_cn": "A"}


def rewritten(golden: Path, name: str, target: Path, texts: Any) -> Path:
    source = golden / ANSWERS[name]
    if not source.is_file():
        source = next(p for p in sorted(golden.rglob(source.name)) if BENCHMARKS[name].folders[0] in p.parts)
    rows = [json.loads(line) for line in source.read_text().splitlines() if line.startswith("{")]
    for number, row in enumerate(rows):
        row["pred" if "pred" in row else "text"] = texts(number, len(rows))
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("mode", ["default", "official"])
def test_empty_answers_never_pass_without_a_warning(golden: Path, tmp_path: Path, name: str, mode: Any) -> None:
    answers = rewritten(golden, name, tmp_path / "a.jsonl", lambda number, count: "")
    score = score_file(name, answers, golden, mode)
    assert len(score.unexpected) > 1
    assert "in none of the expected forms" in score.warnings[0]
    assert BENCHMARKS[name].form in score.warnings[0]


@pytest.mark.parametrize("name", ANSWERS)
def test_good_answers_are_not_mentioned_and_a_few_odd_ones_only_noted(golden: Path, tmp_path: Path, name: str) -> None:
    good = GOOD.get(name, "red")
    score = score_file(name, rewritten(golden, name, tmp_path / "a.jsonl", lambda number, count: good), golden)
    assert score.unexpected == []
    assert score.warnings == []
    answers = rewritten(golden, name, tmp_path / "b.jsonl", lambda number, count: "" if number == count - 1 else good)
    score = score_file(name, answers, golden)
    assert len(score.unexpected) == 1
    count = len(answers.read_text().splitlines())
    assert [len(score.warnings), sum("expected forms" in n for n in score.notes)] == ([0, 1] if count >= 20 else [1, 0])


def test_what_the_official_scorer_makes_of_nothing_is_said_on_the_command_line(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = rewritten(golden, "pope", tmp_path / "a.jsonl", lambda number, count: "")
    with pytest.raises(SystemExit) as end:
        main(["score", "pope", "--answers", str(answers), "--data", str(golden)])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "Warning: 64 of 64 answers (100.0%) are in none of the expected forms (yes or no)" in shown


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("pope", "Yes, there is.", True),
        ("pope", " no", True),
        ("pope", "Not at all", False),
        ("pope", "There is a dog.", False),
        ("pope", "nothing", False),
        ("gqa", "left", True),
        ("gqa", "...", False),
        ("gqa", "the man in the picture is wearing a very long red coat", False),
        ("scienceqa", "A. pine", True),
        ("scienceqa", "pine", False),
        ("mmvet", "x = -1 or x = -5", True),
        ("mmvet", "\n", False),
        ("mme", "maybe", False),
    ],
)
def test_forms(name: str, text: str, expected: bool) -> None:
    assert BENCHMARKS[name].in_form(text) is expected
