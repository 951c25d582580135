"""Comparison of MM-Vet with a judge that gives recorded replies."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golden_text import load

from evengaze.evaluate.benchmarks import ScoreOptions
from evengaze.evaluate.benchmarks.mmvet import MMVet
from evengaze.evaluate.judge import Judge, JudgeError, Reply
from evengaze.evaluate.metrics import mmvet as metric

if TYPE_CHECKING:
    from run_golden import Report

# A recorded rate limit: the client waits and asks again by itself.
RATE_LIMIT = "__RATE__"


class RecordedJudge(Judge):
    """Gives replies from a list, in order."""

    def __init__(self, replies: Iterable[str], model: str = "judge-x") -> None:
        self._replies: Iterator[str] = iter([reply for reply in replies if reply != RATE_LIMIT])
        self._model = model
        self.calls: list[dict[str, Any]] = []

    def describe(self) -> dict[str, Any]:
        return {"kind": "recorded", "model": self._model}

    def ask(
        self, messages: Sequence[dict[str, str]], max_tokens: int | None, temperature: float | None, turn: str = ""
    ) -> Reply:
        reply = next(self._replies, None)
        if reply is None:
            raise JudgeError("no recorded reply is left")
        self.calls.append({"messages": messages, "max_tokens": max_tokens, "temperature": temperature, "reply": reply})
        return Reply(reply, self._model)


def mmvet(report: Report, data: Path, entry: Any) -> None:
    from golden_image import answers_of, prompts

    benchmark = MMVet()
    annotations = load(data, "playground/data/eval/mm-vet/mm-vet.json")
    for name, path in entry["converted"].items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            benchmark.write_submission(answers_of(data, "mm-vet", name), data, out)
            report.check(f"mmvet {name} converted", json.loads(out.read_text()), load(data, path))
    prompts(report, data, entry["prompts"], benchmark, benchmark.records(data))
    texts = load(data, entry["converted"]["gold"])
    for name, item in entry["judged"].items():
        replies = load(data, f"{item['dir']}/judge_replies.json")
        recorded = load(data, f"{item['dir']}/judge_calls.json")
        grade_file = data / item["dir"] / "grade.json"
        grades, calls = regrade(annotations, texts, replies)
        report.check(f"mmvet {name} grades", grades, json.loads(grade_file.read_text()))
        asked = [call for call in recorded["calls"] if call.get("reply", RATE_LIMIT) != RATE_LIMIT]
        want = [
            [recorded["fewshot_prefix"] + c["prompt_tail"], c["max_tokens"], c["temperature"], c["reply"]]
            for c in asked
        ]
        got = [[c["messages"][0]["content"], c["max_tokens"], c["temperature"], c["reply"]] for c in calls]
        report.check(f"mmvet {name} calls", got, want)
        limits = sum(reply == RATE_LIMIT for runs in replies.values() for run in runs for reply in run)
        report.check(f"mmvet {name} number of calls", len(calls) + limits, item["n_judge_calls"])
        options = ScoreOptions(judged=grade_file)
        score = benchmark.score(answers_of(data, "mm-vet", "gold"), data, "official", options).metrics
        summary = {"total": str(score["total"]), "std": str(score["std"]), "runs": str(score["runs"])}
        for key, groups in (("cap_score", "capabilities"), ("cap_int_score_sorted_names", "capability_sets")):
            got_table = {group: str(value) for group, value in score[groups].items()} | summary
            report.check(f"mmvet {name} {key}", got_table, item[key])
        report.check(f"mmvet {name} unrounded", score["total_unrounded_per_run"], item["total_unrounded_per_run"])


def regrade(annotations: Any, texts: Any, replies: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Grade every answer anew from recorded replies: run by run, item by item, as upstream."""
    grades: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for run in range(max(len(runs) for runs in replies.values())):
        for key, row in annotations.items():
            judge = RecordedJudge(replies[key][run])
            message = metric.build_question(row["question"], row["answer"], texts[key])
            graded = metric.grade(judge, message, f"run {run + 1}", official=True)
            for field, value in graded.items():
                grades.setdefault(key, {}).setdefault(field, []).append(value)
            calls += judge.calls
    return grades, calls
