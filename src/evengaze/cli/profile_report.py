"""What `evengaze profile` prints, writes and draws, from its rows."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from evengaze.cli import output, tables, terminal

Rows = Sequence[Mapping[str, Any]]

_CLEAR = 0.02
"""Methods whose FLOPs differ by less than this share of the dense model's are not compared."""


def name_of(row: Mapping[str, Any]) -> str:
    """A row's method with its variant."""
    from evengaze.profile.rows import label

    return label(str(row["method"]), str(row.get("variant") or ""))


def report(rows: Rows) -> None:
    """Two tables and the sentences of each batch size."""
    first = rows[0]
    weights = "random weights" if first["random_weights"] else "its own weights"
    shown = f" ({first['pictures']})" if first["pictures"] else ""
    terminal.echo(
        "\n".join(
            tables.lines(
                [
                    f"{first['model']} ({first['model_type']}, {first['layers']} layers, {weights}), {first['dtype']}, "
                    f"{first['attention']} attention, on {first['device']}; torch {first['torch']}, transformers "
                    f"{first['transformers']}.",
                    f"A prompt has {first['visual_tokens']} visual{shown} and {first['text_tokens']} other tokens, "
                    + (f"an answer {first['new_tokens']}." if first["new_tokens"] > 1 else "answers are left out."),
                ]
            )
        )
    )
    for batch, group in itertools.groupby(rows, key=lambda row: row["batch"]):
        alike = list(group)
        terminal.echo("")
        terminal.echo(_prefills(alike, f"Batch {batch}, prefill"))
        terminal.echo("")
        terminal.echo(_answers(alike, f"Batch {batch}, {'decoding and ' if alike[0]['new_tokens'] > 1 else ''}memory"))
        terminal.echo("")
        terminal.echo(
            "\n".join(tables.lines([f"{name_of(row)}: {row['verdict']}" for row in alike])) + _why_unknown(alike)
        )
    said = [
        "Percentages are shares of the dense model's, to which nothing is attached. Predicted are FLOPs (of the "
        "decoder's prefill) and bytes (that a decoding step reads); the rest is measured: medians of "
        f"{first['rounds']} rounds, and the interval of the prefill's share. The tower's time holds all that is not "
        "the decoder; peak is what a prefill holds beyond the weights, cache the keys and values after it."
    ]
    output.note("\n".join(tables.lines(said)))


def _prefills(rows: Rows, title: str) -> str:
    heads = ("average tokens", "FLOPs", "tower ms", "decoder ms", "of dense", "prefill ms", "of dense", "interval")
    cells = [
        [
            name_of(row),
            f"{row['average_tokens']:.1f}",
            f"{row['flops']:.0%}",
            _ms(row["tower_seconds"]),
            _ms(row["decoder_seconds"]),
            _share(row["decoder"]),
            _ms(row["prefill_seconds"]),
            _share(row["time"]),
            _interval(row, "time"),
        ]
        for row in rows
        if row["variant"] != "static"
    ]
    return tables.table([tables.name("method"), *map(tables.Column, heads)], cells, title=title)


def _answers(rows: Rows, title: str) -> str:
    heads = (
        *("bytes", "step ms", "of dense", "answer s", "of dense", "peak MB", "of dense", "cache MB", "of dense"),
        "largest batch",
    )
    cells = [
        [
            name_of(row),
            f"{row['predicted_step']:.0%}" if row["new_tokens"] > 1 else "",
            *_answer(row),
            _mega(row["peak_bytes"]),
            _share(row["peak_memory"]),
            _mega(row["kv_bytes"]),
            _share(row["kv_cache"]),
            "-" if row["largest_batch"] is None else str(row["largest_batch"]),
        ]
        for row in rows
    ]
    return tables.table([tables.name("method"), *map(tables.Column, heads)], cells, title=title)


def _answer(row: Mapping[str, Any]) -> list[str]:
    """Step and answer; nothing where no answers were asked for, so that the columns are left out."""
    if row["new_tokens"] < 2:
        return [""] * 4
    seconds = row["answer_seconds"]
    answer = "-" if seconds is None else f"{seconds:.3g}"
    return [_ms(row["step_seconds"]), _share(row["step"]), answer, _share(row["answer"])]


def _why_unknown(rows: Rows) -> str:
    reasons = dict.fromkeys(row["largest_batch_why"] for row in rows if row["largest_batch"] is None)
    if len(reasons) != 1:
        return ""
    return "\n" + "\n".join(tables.lines([f"Largest batch: not known, {next(iter(reasons))}."]))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}" if seconds < 10 else f"{seconds * 1e3:.0f}"


def _mega(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.4g}" if size < 1e10 else f"{size / 1e6:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None or low == high else tables.together(f"[{low:.0%}, {high:.0%}]")


def contradictions(rows: Rows) -> list[str]:
    """Where times are in another order than FLOPs, or so uncertain that they say nothing, in words."""
    found = []
    measured = [row for row in rows if row["time"] is not None]
    for one, other in itertools.combinations(measured, 2):
        if (one.get("batch"), one.get("variant")) != (other.get("batch"), other.get("variant")):
            continue
        less, more = (one, other) if one["flops"] < other["flops"] else (other, one)
        if more["flops"] - less["flops"] > _CLEAR and less["time"] > more["time"]:
            sure = less["time_low"] > more["time_high"]
            why = (
                "their intervals do not overlap: the method's own work, or launching kernels, costs more than it saves "
                "on prompts as short as this"
                if sure
                else "their intervals overlap, so this is noise: give more --rounds, or leave the machine to it"
            )
            where = f"batch {one['batch']}: " if len({row.get("batch") for row in rows}) > 1 else ""
            found.append(
                f"{where}{name_of(less)} has fewer FLOPs than {name_of(more)} ({less['flops']:.0%} to "
                f"{more['flops']:.0%}) but took longer ({less['time']:.0%} to {more['time']:.0%}); {why}"
            )
    return found


def written(path: Path, rows: Rows) -> None:
    """All figures as comma-separated values, one row a line."""
    from evengaze.files import write_whole

    buffer = StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())


def plotted(path: Path, rows: Rows) -> None:
    """The parts of every row as a figure."""
    from evengaze.viz.profile import parts_figure
    from evengaze.viz.style import save

    save(parts_figure(rows), path)
