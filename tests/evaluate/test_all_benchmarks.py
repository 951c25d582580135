"""Every benchmark goes through the runner: prompts as the official scripts make them, answers that can be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evengaze.evaluate.benchmarks import BENCHMARKS
from evengaze.evaluate.predictor import Predictor
from evengaze.evaluate.runner import Job, run
from evengaze.evaluate.setting import Setting
from evengaze.methods import parse
from runner_fakes import EchoBackend

FOLDERS = {"mmvet": "mm-vet", "mme": "MME"}
RECORDED = [name for name in BENCHMARKS if not name.endswith(("_val", "_qa")) and name != "questions"]


@pytest.mark.parametrize("name", RECORDED)
def test_prompts_are_those_that_the_official_scripts_made(name: str, golden: Path) -> None:
    recorded = json.loads((golden / "expected" / FOLDERS.get(name, name) / "prompts.json").read_text())["items"]
    benchmark = BENCHMARKS[name]
    predictor = Predictor.__new__(Predictor)  # prompts need no model
    predictor.style = "official"
    predictor._markers = ("<image>", "<video>")  # what LLaVA's processor takes for pictures
    prompts = {predictor.prompt(record, benchmark.template) for record in benchmark.records(golden)}
    assert recorded
    assert [item["prompt"] for item in recorded if item["prompt"] not in prompts] == []


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "questions"])
def test_answers_of_a_run_can_be_scored(name: str, golden: Path, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    if benchmark.missing_files(golden):
        pytest.skip(f"the recorded data do not have {name}")
    job = Job(benchmark, golden, parse("dense"), tmp_path / name, Setting(batch_size=7))
    outcome = run(job, EchoBackend())
    records = list(benchmark.records(golden))
    assert list(outcome.answers) == [record.key for record in records]
    assert outcome.problem is None
    assert outcome.score is not None
    assert not outcome.score.problems.missing
    assert not outcome.score.problems.unknown
    assert not outcome.score.problems.duplicate
    again = run(job, EchoBackend())
    assert again.score is not None
    assert again.score.value == outcome.score.value
