"""Comparisons that need no dataset: normalisers, conversation templates, chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golden_helpers import chunk_range

from evengaze.errors import ConfigError
from evengaze.evaluate.metrics.normalize import (
    evalai_normalize,
    fold_case,
    fold_whitespace,
    map_words,
    strip_punctuation,
    vqa_normalize,
)
from evengaze.evaluate.templates import render_template

if TYPE_CHECKING:
    from run_golden import Report


def load(data: Path, path: str) -> Any:
    return json.loads((data / path).read_text(encoding="utf-8"))


def normalizer(report: Report, data: Path, entry: Any) -> None:
    recorded = load(data, entry["file"])
    for item in recorded["evalai_m4c"]:
        tokenized = fold_case(item["in"])
        whitespace = fold_whitespace(tokenized)
        punctuation = strip_punctuation(whitespace)
        stages = {
            "in": item["in"],
            "tokenized": tokenized,
            "whitespace": whitespace,
            "punctuation": punctuation,
            "out": map_words(punctuation),
        }
        report.check(f"normalizer evalai {item['in']!r}", stages, item)
        report.check(f"normalizer evalai {item['in']!r} in one", evalai_normalize(item["in"]), item["out"])
    for item in recorded["vqa_official_py27"]:
        punctuation = strip_punctuation(fold_whitespace(item["in"]))
        report.check(f"normalizer vqa {item['in']!r} punctuation", punctuation, item["punctuation"])
        report.check(f"normalizer vqa {item['in']!r}", vqa_normalize(item["in"]), item["out"])
    report.check("normalizer counts", len(recorded["evalai_m4c"]), entry["n_evalai"])
    report.check("normalizer vqa counts", len(recorded["vqa_official_py27"]), entry["n_vqa_official"])


def conversation(report: Report, data: Path, entry: Any) -> None:
    recorded = load(data, entry["file"])
    report.check("conversation count", len(recorded), entry["n"])
    for item in recorded:
        try:
            got = render_template(item["template"], item["user"])
        except ConfigError:
            got = None
        report.check(f"conversation {item['library']} {item['template']} {item['user']!r}", got, item.get("prompt"))


def chunks(report: Report, data: Path, entry: Any) -> None:
    for case in entry["cases"]:
        try:
            got = chunk_range(case["n"], case["num_chunks"], case["chunk_idx"])
            result: Any = [got.start, len(got)]
        except ConfigError:
            result = "raises"
        want = "raises" if "raises" in case else [case["start"], case["len"]]
        report.check(f"chunks {case}", result, want)


CHECKS = {"normalizer": normalizer, "conversation": conversation, "chunks": chunks}
