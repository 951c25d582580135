"""Zero-shot video question answering in Video-LLaVA's layout (`run_inference_video_qa.py`, `eval_video_qa.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import clean_or_stop
from evengaze.evaluate.benchmarks.judged import JudgedBenchmark
from evengaze.evaluate.benchmarks.rows import number_repeats
from evengaze.evaluate.benchmarks.types import Mode, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Lines
from evengaze.evaluate.judge import judge_all, silent
from evengaze.evaluate.metrics import video_judge
from evengaze.evaluate.metrics.forms import is_something
from evengaze.evaluate.video import find_video
from evengaze.extras import require
from evengaze.files import read_json, write_whole

QUESTIONS = "test_q.json"
ANSWERS = "test_a.json"
DOWNLOAD = "https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md (data for validating)"


class VideoQA(JudgedBenchmark):
    """Video question answering: a judge says whether an answer is right and scores it from 0 to 5."""

    split = "test"
    metric = "judged accuracy (%)"
    layout: ClassVar[Literal["llava", "video-llava"]] = "video-llava"
    videos: ClassVar[str]
    max_new_tokens = 1024
    template = "llava_v1"
    judge_prompt = video_judge.PROMPT
    official_judge = video_judge.OFFICIAL_JUDGE
    form = "any text"
    quirks = (
        "its average score also divides by verdicts that cannot be read, its accuracy does not",
        "it takes the answers from the prediction file, where a run in several chunks stored wrong ones",
    )

    def in_form(self, text: str) -> bool:
        """Whether there is an answer at all."""
        return is_something(text)

    def check(self, data: Path) -> list[str]:
        """See `Benchmark.check`; videos need a package besides."""
        require("video", "a video", "av")
        return super().check(data)

    def records(self, data: Path) -> Iterator[Record]:
        """Yield all questions; a video that is absent is given as the path where it should be."""
        folder = self.path(data, self.videos)
        for key, row in self._questions(data).items():
            yield Record(key, row["question_id"], row["question"], video=find_video(folder, row["video_name"]))

    def _questions(self, data: Path) -> dict[str, dict[str, Any]]:
        return self._keyed(data, QUESTIONS, ("video_name", "question_id", "question"))

    def _truth(self, data: Path) -> dict[str, str]:
        return {key: str(row["answer"]) for key, row in self._keyed(data, ANSWERS, ("question_id", "answer")).items()}

    def _keyed(self, data: Path, name: str, fields: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        path = self.path(data, name)
        rows = read_json(path, list, self.source(name))
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not set(fields) <= row.keys():
                raise DataError(f"{path}: entry {i} has not all of {', '.join(fields)}. {self.source(name)}")
        return dict(zip(number_repeats(str(row["question_id"]) for row in rows), rows, strict=True))

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score the questions that have a prediction, with answers joined by question id."""
        questions, truth = self._questions(data), self._truth(data)
        joined = self.join(list(questions), answers)
        lost = [key for key in joined.by_key if key not in truth]
        if lost:
            raise DataError(
                f"{self.path(data, ANSWERS)} has no answer to {len(lost)} questions of {self.path(data, QUESTIONS)} "
                f"(first: {lost[0]}); the files do not belong together. {self.source(ANSWERS)}"
            )
        texts = {key: (joined.by_key[key]["text"], truth[key]) for key in questions if key in joined.by_key}
        asked = {key: questions[key]["question"] for key in texts}
        verdicts, errors = self._verdicts(texts, asked, options, official=False)
        pairs = {}
        for key, verdict in verdicts.items():
            try:
                pairs[key] = video_judge.read_pair(verdict)
            except ValueError as error:
                errors.append({"key": key, "error": str(error)})
        score = self._score("default", verdicts, len(questions), options)
        if pairs:
            score.metrics |= video_judge.aggregate(pairs.values())
            score.value = 100 * score.metrics["accuracy"]
            score.per_record = {key: float(right) for key, (right, _) in pairs.items()}
            score.n_scored = len(pairs)
        joined.problems.errors = errors
        score.problems = joined.problems
        score.notes += self._mispaired(joined.by_key, truth, score)
        self.add_offline(score, texts)
        return score

    @staticmethod
    def _mispaired(by_key: dict[str, dict[str, Any]], truth: dict[str, str], score: Score) -> list[str]:
        """Name the lines that store another question's answer (Video-LLaVA's chunking bug)."""
        wrong = [key for key, row in by_key.items() if "answer" in row and str(row["answer"]) != truth[key]]
        score.metrics["mispaired"] = wrong
        if not wrong:
            return []
        return [
            f"{len(wrong)} lines store another answer than the dataset's (the official script pairs answers by "
            f"position within a chunk); the dataset's were used. First: {', '.join(wrong[:5])}"
        ]

    def _compare(self, score: Score, official: Callable[[], Score]) -> None:
        """Compare with the official number, unless that would mean judging other answers at the user's cost."""
        if score.metrics["mispaired"] and score.judge is not None and score.judge["kind"] != "recorded":
            score.notes.append("The official number would judge against the stored answers; it was not computed.")
            return
        super()._compare(score, official)

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score the lines of a prediction file, with the answers stored in it where it has them."""
        questions, truth = self._questions(data), self._truth(data)
        texts, asked = {}, {}
        for row in clean_or_stop(answers):
            key = str(row["question_id"])
            if "answer" not in row and (key not in truth or key not in questions):
                raise OfficialError("KeyError: 'answer'", f"{key} is no question and its line stores no answer")
            texts[key] = (row["text"], str(row["answer"]) if "answer" in row else truth[key])
            asked[key] = str(row["question"]) if "question" in row else questions[key]["question"]
        verdicts, errors = self._verdicts(texts, asked, options, official=True)
        score = self._score("official", verdicts, len(questions), options)
        score.problems.errors = errors
        if verdicts:
            try:
                score.metrics |= video_judge.aggregate_official(verdicts.values())
            except ZeroDivisionError as error:
                raise OfficialError(f"ZeroDivisionError: {error}", "no verdict says yes or no") from None
            score.value = 100 * score.metrics["accuracy"]
        self.add_offline(score, texts)
        return score

    def _verdicts(
        self, texts: dict[str, tuple[str, str]], asked: dict[str, str], options: ScoreOptions, official: bool
    ) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Return verdicts by key, from the judge or recorded ones."""
        if options.judged is not None:
            found = _read_judged(options.judged)
            return self.take_judged(found, texts, options.judged)
        judge = options.judge
        if judge is None:
            return {}, []

        def ask(key: str) -> Any:
            prediction, answer = texts[key]
            return video_judge.judge_answer(judge, video_judge.build_messages(asked[key], answer, prediction), official)

        return judge_all(list(texts), ask, options.workers, options.say or silent)

    def _score(self, mode: Mode, verdicts: dict[str, Any], n_records: int, options: ScoreOptions) -> Score:
        model = options.judge.describe()["model"] if options.judge is not None else ""
        return self.judged_result(
            mode,
            options,
            [model] if model else [],
            value=None,
            metrics={"verdicts": verdicts},
            n_records=n_records,
            n_scored=len(verdicts),
            per_record={},
        )

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write Video-LLaVA's prediction file (JSON lines of id, question, answer, pred), answers joined by id."""
        questions, truth = self._questions(data), self._truth(data)
        joined = self.join(list(questions), self.read_answers(answers))
        rows = [
            {
                "id": row["question_id"],
                "question": row["question"],
                "answer": truth[key],
                "pred": joined.by_key[key]["text"],
            }
            for key, row in questions.items()
            if key in joined.by_key
        ]
        write_whole(out, "".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(out), "total_results": len(rows), "missing": joined.problems.missing}


def _read_judged(path: Path) -> dict[str, Any]:
    """Read stored verdicts: the combined JSON, or a folder of `<id>.json`; each is [verdict, question]."""
    if path.is_dir():
        found = {item.stem: read_json(item, list) for item in sorted(path.glob("*.json"))}
    else:
        found = read_json(path, dict, "Give the combined results.json or the folder of <id>.json files.")
    if not found:
        raise DataError(f"{path} holds no judgement (<id>.json). Give the folder that the judge's verdicts are in.")
    try:
        return {key: entry[0] for key, entry in found.items()}
    except (TypeError, IndexError, KeyError):
        raise DataError(f"{path}: an entry is not [verdict, question]. Judge again.") from None
