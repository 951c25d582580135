"""Scoring a predictions file, and listing what benchmarks need: what `evengaze score` and `evengaze list` call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks import BENCHMARKS, Benchmark, Score, ScoreOptions, get_benchmark
from evengaze.evaluate.benchmarks.types import Mode


def score_file(
    benchmark: str,
    answers: Path | str,
    data: Path | str,
    mode: Mode = "default",
    options: ScoreOptions | None = None,
    submission: Path | str | None = None,
) -> Score:
    """Score the predictions of any program, given in LLaVA's or Video-LLaVA's record format.

    Args:
        benchmark: Name, see `list_benchmarks`.
        answers: Predictions file.
        data: Folder that holds the datasets in LLaVA's or Video-LLaVA's layout.
        mode: "default" is correct and says how the official number differs; "official" reproduces it.
        options: What only some benchmarks ask for.
        submission: Also write the file that the benchmark's server or official evaluator takes.

    Raises:
        DataError: A file is missing, malformed, or belongs to something else.
        ConfigError: No such benchmark, mode or option.
    """
    chosen = get_benchmark(benchmark)
    score = chosen.score(Path(answers), Path(data), mode, options)
    if submission is not None:
        score.metrics["submission"] = chosen.write_submission(Path(answers), Path(data), Path(submission))
    return score


def list_benchmarks(data: Path | str | None = None, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Describe every benchmark: name, split, metric, what files it needs, and which are missing.

    Args:
        data: Folder to look in; None lists what is needed without looking.
        names: Only these; all by default.

    Returns:
        Per benchmark `name`, `title`, `split`, `metric`, `server`, `layout` (where its files belong),
        `files` (path, kind, needed, source, present), and with `data` `can_run`, `can_score`, `missing` and
        `missing_media` (how many images or videos that questions ask about are absent, or what keeps them from being
        counted).

    Raises:
        ConfigError: No benchmark of that name.
    """
    chosen = [get_benchmark(name) for name in names] or list(BENCHMARKS.values())
    return [_describe(item, None if data is None else Path(data)) for item in chosen]


def _describe(benchmark: Benchmark, data: Path | None) -> dict[str, Any]:
    absent = {item.path for item in benchmark.missing_files(data)}
    info: dict[str, Any] = {
        "name": benchmark.name,
        "title": benchmark.title,
        "split": benchmark.split,
        "metric": benchmark.metric,
        "server": benchmark.server,
        "layout": benchmark.location,
        "files": [
            {
                "path": item.path,
                "kind": item.kind,
                "needed": item.needed,
                "source": item.where,
                **({} if data is None else {"present": item.path not in absent}),
            }
            for item in benchmark.files
        ],
    }
    if data is None:
        return info
    info["missing"] = sorted(absent)
    info["can_score"] = not benchmark.missing_files(data, "score")
    info["can_run"] = not benchmark.missing_files(data, "run")
    info["missing_media"] = None
    if info["can_run"]:
        try:
            info["missing_media"] = len(benchmark.missing_media(data))
        except DataError as error:
            info["missing_media"], info["can_run"] = str(error), False
    return info
