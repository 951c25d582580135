from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from evengaze.cli import main
from evengaze.cli.score import register

EVAL = "playground/data/eval"
app = typer.Typer()
register(app)
runner = CliRunner()


def call(*args: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_score_prints_pure_json(golden: Path) -> None:
    answers = golden / EVAL / "pope/answers/gold_shuffled.jsonl"
    code, out, _ = call("score", "pope", "--answers", answers, "--data", golden, "--json")
    result = json.loads(out)
    assert code == 0 and result["value"] == pytest.approx(54.3399209486166)
    assert result["official"]["differs"] and result["complete"]
    code, out, _ = call("score", "POPE", "--answers", answers, "--data", golden, "--mode", "official", "--json")
    assert json.loads(out)["value"] == pytest.approx(51.2094861660079)


def test_score_for_people_names_problems(golden: Path) -> None:
    answers = golden / EVAL / "pope/answers/gold_missing.jsonl"
    code, out, _ = call("score", "pope", "--answers", answers, "--data", golden)
    assert code == 3 and "3 missing: 1, 8, 10000007" in out and "mean F1 (%): 51.87" in out


def test_errors_go_to_stderr_with_exit_status_2(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["score", "pope", "--data", str(golden), *map(str, args)])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == ""
        return " ".join(err.split())

    assert "Error: " in fail("--answers", tmp_path / "no.jsonl", "--json")
    assert "no.jsonl does not exist" in fail("--answers", tmp_path / "no.jsonl", "--json")
    answers = golden / EVAL / "pope/answers/gold.jsonl"
    assert "mode must be default or official" in fail("--answers", answers, "--mode", "fast")
    assert "--judge-url needs --judge" in fail("--answers", answers, "--judge-url", "http://x")


def test_score_writes_submission_and_result(golden: Path, tmp_path: Path) -> None:
    answers = golden / EVAL / "vizwiz/answers/gold.jsonl"
    upload, result = tmp_path / "up/load.json", tmp_path / "result.json"
    code, _, _ = call(
        *("score", "vizwiz", "--answers", answers, "--data", golden), *("--submission", upload, "--out", result)
    )
    assert code == 0 and len(json.loads(upload.read_text())) == 40
    assert json.loads(result.read_text())["metrics"]["submission"]["total_split"] == 40


def test_list_benchmarks(golden: Path, tmp_path: Path) -> None:
    code, out, _ = call("list", "benchmarks", "--data", golden, "--json")
    items = {item["name"]: item for item in json.loads(out)}
    assert code == 0 and len(items) == 16 and items["gqa"]["can_run"] and items["gqa"]["missing"] == []
    assert items["vqav2_val"]["missing"] and items["msvd_qa"]["missing_media"] == 1
    code, out, _ = call("list", "benchmarks")
    assert code == 0 and "textvqa" in out and "TextVQA_0.5.1_val.json" in out
    code, out, _ = call("list", "benchmarks", "--data", tmp_path)
    assert code == 0 and "lacks" in out
