"""The benchmark of one's own questions, on the folder that the embedded model's data are written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evengaze import demo
from evengaze.errors import DataError
from evengaze.evaluate.benchmarks import get_benchmark
from runner_fakes import write_lines

BENCHMARK = get_benchmark("questions")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    demo.write_dataset(tmp_path / "data", images=3)
    return tmp_path / "data"


def predictions(data: Path, wrong: int = 0) -> Path:
    truth = [json.loads(line) for line in (data / "answers.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["text"] for line in (data / "questions.jsonl").read_text().splitlines()]
    rows = [
        {"question_id": row["question_id"], "prompt": prompt, "text": "?" if n < wrong else f"The {row['answer']}."}
        for n, (row, prompt) in enumerate(zip(truth, prompts, strict=True))
    ]
    write_lines(data / "predictions.jsonl", rows)
    return data / "predictions.jsonl"


def test_records_point_to_the_pictures(data: Path) -> None:
    records = list(BENCHMARK.records(data))
    assert len(records) == len({record.key for record in records}) > 6
    assert all(isinstance(record.image, Path) and record.image.is_file() for record in records)
    assert not BENCHMARK.missing_files(data)


def test_accuracy_is_that_of_normalised_answers_with_a_breakdown(data: Path) -> None:
    score = BENCHMARK.score(predictions(data, wrong=1), data)
    assert score.value == pytest.approx(100 * (score.n_records - 1) / score.n_records)
    assert sum(group["samples"] for group in score.metrics["categories"].values()) == score.n_records
    assert score.per_record["0"] == 0.0


def test_several_answers_may_be_accepted_but_not_none(data: Path) -> None:
    rows = [json.loads(line) for line in (data / "answers.jsonl").read_text().splitlines()]
    given = predictions(data)
    rows[0]["answer"] = ["something else", rows[0]["answer"]]
    write_lines(data / "answers.jsonl", rows)
    assert BENCHMARK.score(given, data).value == 100.0
    rows[0]["answer"] = []
    write_lines(data / "answers.jsonl", rows)
    with pytest.raises(DataError, match="must be a string or a list of strings"):
        BENCHMARK.score(data / "predictions.jsonl", data)
