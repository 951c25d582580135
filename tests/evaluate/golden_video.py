"""Comparisons of the video benchmarks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from golden_image import prompts
from golden_judge import RecordedJudge
from golden_text import load

from evengaze.evaluate.benchmarks import BENCHMARKS, Benchmark, OfficialError, ScoreOptions
from evengaze.evaluate.metrics import video_judge
from evengaze.evaluate.video import frame_indices, read_frames

if TYPE_CHECKING:
    from run_golden import Report

OFFLINE = {
    "raw": "exact_match",
    "lower_strip_period": "exact_match_loose",
    "evalai": "normalised_match",
    "evalai_word_contains": "containment",
}
# Lossy compression of uniform grey frames.
GREY_TOLERANCE = 5


def video(report: Report, data: Path, entry: Any) -> None:
    for name, item in entry["datasets"].items():
        report.run(f"video {name}", lambda name=name, item=item: dataset(report, data, name, item))
    for n, want in entry["frame_indices"]["cases"].items():
        report.check(f"video frame_indices {n}", frame_indices(int(n)), want)
    for path, item in entry["video_files"]["files"].items():
        report.run(f"video {path}", lambda path=path, item=item: frames(report, data / path, item))


def frames(report: Report, path: Path, item: Any) -> None:
    indices = item["indices_official_formula"]
    report.check(f"{path.name} indices", frame_indices(item["frames_written"]), indices)
    wanted = [min(255, 8 + 6 * index) for index in indices]
    got = [float(np.asarray(frame).mean()) for frame in read_frames(path)]
    close = len(got) == len(wanted) and all(abs(a - b) <= GREY_TOLERANCE for a, b in zip(got, wanted, strict=True))
    report.check(f"{path.name} frames {got} {wanted}", close, True)


def dataset(report: Report, data: Path, name: str, item: Any) -> None:
    benchmark = BENCHMARKS[f"{name.lower()}_qa"]
    root = benchmark.root(data)
    merged = root / "gold/merge.jsonl"
    records = list(benchmark.records(data))
    report.check(f"video {name} questions", len(records), item["n_questions"])
    there = [record for record in records if record.video is not None and record.video.is_file()]
    report.check(f"video {name} predictions", len(there), item["n_predictions"])
    prompts(report, data, item["prompts"], benchmark, there)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "merge.jsonl"
        benchmark.write_submission(merged, data, out)
        got = [json.loads(line) for line in out.read_text().splitlines()]
        report.check(f"video {name} file", got, [json.loads(line) for line in merged.read_text().splitlines()])
    score = benchmark.score(merged, data, "official")
    offline = item["exact_match_independent"]
    for theirs, ours in OFFLINE.items():
        report.check(f"video {name} {theirs}", score.offline[ours] / 100, offline["accuracy"][theirs])
        per_record = {row["id"]: float(row[theirs]) for row in offline["per_record"]}
        report.check(f"video {name} {theirs} each", score.metrics["offline_per_record"][ours], per_record)
    for chunked in root.glob("gold_*chunks/merge.jsonl"):
        mispaired = benchmark.score(chunked, data).metrics["mispaired"]
        report.check(f"video {name} mispaired", mispaired, item["two_chunk_bug"]["mispaired_ids"])
    messages = []
    for key, want in item.items():
        if key.startswith("gpt_"):
            messages += judged(report, data, f"video {name} {key}", benchmark, merged, want)
    report.check(f"video {name} example call", item["example_call"]["messages"] in messages, True)


def judged(report: Report, data: Path, name: str, benchmark: Benchmark, merged: Path, want: Any) -> list[Any]:
    """Read the recorded replies anew, compare with the stored verdicts, and average; return all messages."""
    results, replies = load(data, want["results"]), load(data, want["replies"])
    messages = []
    for key, given in replies.items():
        asked = results[key][1]
        chat = video_judge.build_messages(asked["q"], asked["a"], asked["pred"])
        judge = RecordedJudge(given)
        report.check(f"{name} {key}", video_judge.judge_answer(judge, chat, official=True), results[key][0])
        report.check(f"{name} {key} calls", len(judge.calls), len(given))
        messages.append(chat)
    try:
        score = benchmark.score(merged, data, "official", ScoreOptions(judged=data / want["results"]))
    except OfficialError as error:
        report.check(f"{name} error", error.official.split(":")[0], str(want.get("error")).split(":")[0])
        return messages
    for key in ("yes_count", "no_count", "accuracy", "average_score", "n"):
        report.check(f"{name} {key}", score.metrics[key], want[key])
    return messages


CHECKS = {"video": video}
