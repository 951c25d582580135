"""What the benchmarks with free-form answers share: a judge, and offline matches beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark
from evengaze.evaluate.benchmarks.types import Mode, Score, ScoreOptions
from evengaze.evaluate.judge import CachedJudge
from evengaze.evaluate.metrics.open_match import MATCHES

Match = Callable[[Callable[[str, str], bool], str, str], bool]


def plain_match(match: Callable[[str, str], bool], prediction: str, answer: str) -> bool:
    """Match against one answer."""
    return match(prediction, answer)


class JudgedBenchmark(Benchmark):
    """A benchmark whose headline needs a judge. Without one only the offline matches are reported.

    Attributes:
        judge_prompt: What the judge is told.
        official_judge: The model behind the published numbers.
    """

    judge_prompt: str
    official_judge: str

    def score(self, answers: Path, data: Path, mode: Mode = "default", options: ScoreOptions | None = None) -> Score:
        """Score a predictions file; see `Benchmark.score`. Every reply of the judge is asked for once."""
        options = options or ScoreOptions()
        if options.judge is not None:
            options = replace(options, judge=CachedJudge(options.judge, options.cache))
        return super().score(answers, data, mode, options)

    def add_offline(self, score: Score, texts: dict[str, tuple[str, str]], how: Match = plain_match) -> None:
        """Add the offline matches to a score, named as such.

        Args:
            score: Score to complete.
            texts: Prediction and answer by key.
            how: How a match is applied to an answer.
        """
        hits = {
            name: {key: float(how(match, prediction, answer)) for key, (prediction, answer) in texts.items()}
            for name, match in MATCHES.items()
        }
        score.offline = {name: 100 * sum(found.values()) / len(found) for name, found in hits.items()}
        score.metrics["offline_per_record"] = hits
        if score.value is None:
            score.per_record, score.n_scored = hits["containment"], len(texts)
            score.notes.append(
                "No judge was given: 'offline' holds matches on the answer string, which are no substitute for the "
                "judged number; 'per_record' is containment."
            )

    def describe_judge(self, options: ScoreOptions, models: Iterable[str]) -> dict[str, Any] | None:
        """Return what goes into the result about the judge: kind, model, address, prompt, names in its replies."""
        if options.judge is not None:
            return {**options.judge.describe(), "answered_as": sorted(set(models)), "prompt": self.judge_prompt}
        if options.judged is not None:
            return {"kind": "recorded", "file": str(options.judged), "answered_as": sorted(set(models))}
        return None

    def judge_notes(self, score: Score) -> list[str]:
        """Warn when the judge is not the one behind the published numbers."""
        if score.judge is None or score.judge.get("model", self.official_judge) == self.official_judge:
            return []
        return [
            f"Judged by {score.judge['model']}; published numbers are by {self.official_judge} and not comparable with "
            "these."
        ]

    def judged_result(self, mode: Mode, options: ScoreOptions, models: Iterable[str], **values: Any) -> Score:
        """Return `result` with what there is to say about the judge; `models` are the names in its replies."""
        score = self.result(mode, judge=self.describe_judge(options, models), **values)
        score.notes = self.judge_notes(score)
        return score

    @staticmethod
    def take_judged(
        found: dict[str, Any], keys: Collection[str], path: Path
    ) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Return the recorded judgements of some records by key, and an error for each record without one.

        Raises:
            DataError: None does.
        """
        if not set(found) & set(keys):
            raise DataError(
                f"none of the {len(found)} judgements in {path} belongs to the predictions (their ids are like "
                f"{', '.join(list(found)[:3])}). Give the judgements of these answers."
            )
        missing = [{"key": key, "error": f"not in {path}"} for key in keys if key not in found]
        return {key: found[key] for key in keys if key in found}, missing
