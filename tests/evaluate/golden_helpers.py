"""What recorded results are compared with, and only tests need: upstream's chunks, and readings before any fallback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evengaze.errors import ConfigError
from evengaze.evaluate.benchmarks import Benchmark
from evengaze.evaluate.benchmarks.base import clean_or_stop
from evengaze.evaluate.benchmarks.mmbench import _EMPTY_CELL, MMBench, choices_of
from evengaze.evaluate.benchmarks.rows import number_repeats
from evengaze.evaluate.benchmarks.scienceqa import ScienceQA
from evengaze.evaluate.metrics.mmbench import RULES, lmms_eval_rule


def chunk_range(n: int, chunks: int, index: int) -> range:
    """Return which of ``n`` questions belong to a chunk: consecutive slices of ceil(n / chunks).

    Raises:
        ConfigError: There is no such chunk; rounding up can leave fewer than were asked for.
    """
    if n < 1 or chunks < 1:
        raise ConfigError(f"{n} questions cannot be divided into {chunks} chunks.")
    size = math.ceil(n / chunks)
    start = index * size
    if not 0 <= start < n:
        raise ConfigError(f"there is no chunk {index}: {n} questions in {chunks} chunks make {math.ceil(n / size)}.")
    return range(start, min(start + size, n))


def done_keys(benchmark: Benchmark, answers: Sequence[dict[str, Any]]) -> list[str]:
    """Return the key of every answer line."""
    return number_repeats(benchmark.answer_key(answer) for answer in answers)


def analyse_official(benchmark: ScienceQA, answers: Path, data: Path) -> list[dict[str, Any]]:
    """Return the entries of the official ``_output.jsonl`` in split order, each with its option ``index``."""
    found = {str(answer["question_id"]): answer for answer in clean_or_stop(benchmark.read_answers(answers))}
    return benchmark._analyse(benchmark._problems(data), found)


def inferred_options(benchmark: MMBench, answers: Path, data: Path) -> dict[str, dict[int, str | None]]:
    """Return the option that each published rule reads from every prediction, before any fallback."""
    lines = benchmark.read_answers(answers)
    rows = benchmark._truth(lines, data)
    found = {str(answer["question_id"]): answer["text"] for answer in lines.records}
    rules = {"vlmevalkit": RULES["vlmevalkit"], "lmms-eval": lmms_eval_rule}
    return {
        name: {index: read(found.get(str(index), _EMPTY_CELL), choices_of(rows[index])) for index in rows}
        for name, read in rules.items()
    }
