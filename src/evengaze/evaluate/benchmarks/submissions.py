"""Writing the files that servers and official evaluators take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evengaze.evaluate.jsonl import Lines
from evengaze.evaluate.metrics.normalize import evalai_normalize
from evengaze.files import write_whole


def write_normalised(
    out: Path, lines: Lines, rows: Iterable[dict[str, Any]], field: str, default: str | None = None
) -> dict[str, Any]:
    """Write a server's JSON: for each question its `field` and the prediction as EvalAI normalises it.

    Args:
        out: File to write.
        lines: The predictions; of several for one question the last counts.
        rows: The questions, in the file's order.
        field: What names a question there.
        default: Stands in for a missing prediction.

    Returns:
        The path and the counts that LLaVA's converters print.
    """
    found = {str(answer["question_id"]): evalai_normalize(answer["text"]) for answer in lines.records}
    written = [{field: row[field], "answer": found.get(str(row["question_id"]), default)} for row in rows]
    write_whole(out, json.dumps(written))
    return {
        "path": str(out),
        "total_results": len(found),
        "total_split": len(written),
        "error_line": sum(not item.is_json for item in lines.malformed),
        "empty": sum(not row["answer"] for row in written),
    }
