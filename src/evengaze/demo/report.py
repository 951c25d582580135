"""What the demo writes: the figures as numbers (JSON), as pictures (PNG) and as one self-contained page (HTML)."""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from evengaze.demo.experiment import EARLY, KEEPS, LAYER, Answers, Experiment, Trial
from evengaze.evaluate.metrics.paired import Paired, compare, wilson
from evengaze.files import write_whole
from evengaze.version import __version__
from evengaze.viz.accuracy import Point, plot_accuracy
from evengaze.viz.bias import plot_trend
from evengaze.viz.patches import Canvas, Drawing, draw_panels
from evengaze.viz.style import save


@dataclass(frozen=True)
class Line:
    """One setting's figures.

    Attributes:
        cell: the setting; None for the dense model.
        accuracy: share of right answers.
        ci95: Wilson interval of it.
        against_dense: paired difference from the dense model; None for the dense model itself.
        against_plain: paired difference from plain FastV at the same budget; None for dense and plain.
        average_tokens: visual tokens that enter a layer, averaged over layers and questions.
        seconds: time in `generate`.
    """

    cell: Trial | None
    accuracy: float
    ci95: tuple[float, float]
    against_dense: Paired | None
    against_plain: Paired | None
    average_tokens: float
    seconds: float


def rows(result: Experiment) -> list[Line]:
    """The dense model first, then every setting in the order in which it was asked for."""
    dense = result.dense.credits(result.questions)
    found = [_row(result, None, result.dense, None, None)]
    for cell, outcome in result.cells:
        credit = outcome.credits(result.questions)
        plain = result.outcome(cell.keep, "plain", cell.layer)
        pair = None if outcome is plain else compare(credit, plain.credits(result.questions))
        found.append(_row(result, cell, outcome, compare(credit, dense), pair))
    return found


def _row(result: Experiment, cell: Trial | None, outcome: Answers, dense: Paired | None, plain: Paired | None) -> Line:
    accuracy = outcome.accuracy(result.questions)
    tokens = sum(outcome.average_tokens) / len(outcome.average_tokens)
    return Line(cell, accuracy, wilson(accuracy, len(result.questions)), dense, plain, tokens, outcome.seconds)


def to_dict(result: Experiment, seconds: float) -> dict[str, Any]:
    """The figures as JSON-able values.

    `ci95` is the interval of `accuracy`; `against_dense` and `against_plain` are paired differences with theirs.
    """
    dense, *cells = rows(result)
    return {
        "dense": {
            "accuracy": dense.accuracy,
            "ci95": list(dense.ci95),
            "average_tokens": dense.average_tokens,
            "seconds": dense.seconds,
            "accuracy_by_type": by_type(result, result.dense),
        },
        "questions": len(result.questions),
        "seconds": seconds,
        "cells": [_cell_dict(result, row) for row in cells],
        "bias": result.calibration.bias,
        "calibration": {
            "pictures": result.calibration.samples,
            "seconds": result.calibration.seconds,
            "trend": result.calibration.curve.trend.to_dict(),
            "fit": result.calibration.curve.fit,
            "summary": result.calibration.curve.summary,
        },
        "dtype": result.dtype,
        "versions": versions(),
    }


def _cell_dict(result: Experiment, row: Line) -> dict[str, Any]:
    cell = row.cell
    assert cell is not None
    return {
        "method": cell.method,
        "layer": cell.layer,
        "keep": cell.keep,
        "debias": cell.debias,
        "baseline": cell.baseline,
        "accuracy": row.accuracy,
        "ci95": list(row.ci95),
        "average_tokens": row.average_tokens,
        "seconds": row.seconds,
        "against_dense": None if row.against_dense is None else asdict(row.against_dense),
        "against_plain": None if row.against_plain is None else asdict(row.against_plain),
        "accuracy_by_type": by_type(result, result.outcome(cell.keep, cell.label, cell.layer)),
    }


def by_type(result: Experiment, outcome: Answers) -> dict[str, float]:
    """Accuracy by question type."""
    kinds = list(dict.fromkeys(q.type for q in result.questions))
    return {kind: outcome.accuracy([q for q in result.questions if q.type == kind]) for kind in kinds}


def versions() -> dict[str, str]:
    """Of everything that the figures may depend on."""
    found = {"evengaze": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "python": platform.python_version(), "threads": str(torch.get_num_threads())}


def figures(result: Experiment) -> dict[str, tuple[str, Any]]:
    """Caption and figure by file name."""
    made: dict[str, tuple[str, Any]] = {}
    share = f"{100 * KEEPS[1]:g} %"
    if result.examples:
        caption = (
            f"Kept tokens at {share}, for the first question of the first pictures (none chosen). Bright and outlined "
            "in yellow: kept. Hatched: padding; outlined in red: padding that was kept. Ticks and crosses: right and "
            "wrong answers."
        )
        made["kept.png"] = (caption, _kept(result))
    caption = (
        f"Mean attention of the last prompt token to each position, over {result.calibration.samples} calibration "
        "pictures that are not among the evaluated ones, and the trend that is divided out."
    )
    made["trend.png"] = (caption, plot_trend(result.calibration.curve))
    dense, *cells = rows(result)
    lines: dict[str, list[Point]] = {}
    for row in sorted(cells, key=lambda r: r.cell.keep if r.cell else 0):
        assert row.cell is not None
        if row.cell.layer != LAYER:
            continue
        point = Point(row.cell.keep, row.accuracy, *row.ci95, row.average_tokens)
        lines.setdefault(row.cell.label, []).append(point)
    ordered = {cell.label: lines[cell.label] for cell, _ in result.cells}
    subtitle = (
        f"{len(result.questions)} questions, K = {LAYER}; bars: 95 % intervals, wider than those of paired differences"
    )
    caption = "Accuracy by tokens kept. All methods at one budget drop the same number of tokens at the same layer."
    made["accuracy.png"] = (caption, plot_accuracy(ordered, dense.accuracy, subtitle))
    return made


def _kept(result: Experiment) -> Any:
    """Two examples a line: the picture, plain, both steps."""
    budget = KEEPS[1]
    plain, both = result.outcome(budget, "plain").answers, result.outcome(budget, "both").answers
    panels: list[Drawing | None] = []
    for example in result.examples:
        number = example.question.question_id
        canvas = Canvas.of(example.plain.layout.rows[example.row].to("cpu"), example.picture.image)
        panels.append(Drawing(canvas, example.question.text, f"all tokens: {result.dense.answers[number]}"))
        for name, trace, answer in (("plain", example.plain, plain), ("both steps", example.both, both)):
            kept = trace.kept(example.row)
            right = answer[number] == example.question.answer
            panels.append(Drawing(canvas, f"{name}: {answer[number]}", canvas.describe(kept), kept, right=right))
    panels += [None] * (-len(panels) % 6)
    return draw_panels([panels[i : i + 6] for i in range(0, len(panels), 6)], height=2.4)


def write(result: Experiment, out: Path, seconds: float) -> Path:
    """Write the pictures (PNG, PDF and SVG), `results.json` and the page.

    Args:
        result: the experiment.
        out: folder; made if it is not there.
        seconds: how long everything took.

    Returns:
        The page.

    Raises:
        DataError: a file cannot be written.
    """
    pictures = {}
    for name, (caption, figure) in figures(result).items():
        drawn, *_ = save(figure, out / name, ("png", "pdf", "svg"))
        pictures[name] = (caption, base64.b64encode(drawn.read_bytes()).decode())
    write_whole(out / "results.json", json.dumps(to_dict(result, seconds), indent=1) + "\n")
    page = out / "report.html"
    write_whole(page, _page(result, pictures, seconds))
    return page


def points(value: float) -> str:
    """A share as percent."""
    return f"{100 * value:.1f}"


def difference(pair: Paired | None) -> str:
    """A paired difference in points with its interval."""
    return "" if pair is None else f"{100 * pair.delta:+.1f} [{100 * pair.low:.1f}, {100 * pair.high:.1f}]"


def headline(result: Experiment) -> str:
    """What came out at the middle budget, at both layers."""
    share, dense = f"{100 * KEEPS[1]:g} %", points(result.dense.accuracy(result.questions))
    every = {(r.cell.layer, r.cell.label): r for r in rows(result) if r.cell is not None and r.cell.keep == KEEPS[1]}
    sentences = [f"Of {len(result.questions)} questions the dense model answers {dense} % right."]
    for layer in (LAYER, EARLY):
        found = {label: row for (at, label), row in every.items() if at == layer}
        both = found["both"].against_plain
        assert both is not None
        verdict = "better" if both.low > 0 else "worse" if both.high < 0 else "no clear difference"
        sentences.append(
            f"With {share} of the tokens from layer {layer} on: plain {points(found['plain'].accuracy)} %, with both "
            f"debias steps {points(found['both'].accuracy)} % ({difference(both)} points, {verdict}), random "
            f"{points(found['random'].accuracy)} %, uniform {points(found['uniform'].accuracy)} %."
        )
    return " ".join(sentences)


def kept(cell: Trial | None) -> str:
    """A setting's budget and layer, for tables."""
    if cell is None:
        return "all"
    return f"{100 * cell.keep:g} %" + ("" if cell.layer == LAYER else f" K={cell.layer}")


_CSS = """
body{font:15px/1.55 system-ui,sans-serif;color:#1f2430;max-width:62rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;break-after:avoid}
.lead{font-size:1.05rem;color:#374151}figure{margin:1rem 0}
img{max-width:100%;border:1px solid #e5e7eb;border-radius:6px}
figcaption,.note{color:#6b7280;font-size:.88rem}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .7rem;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
th{border-bottom:2px solid #d7dbe2;color:#6b7280;font-weight:600}tr.top td{border-top:1px solid #d7dbe2}
@media(max-width:600px){figure{overflow-x:auto}figure img{max-width:none;width:46rem}}
@media print{body{max-width:none;margin:0}.scroll{overflow-x:visible}table{font-size:.68rem}th,td{padding:.2rem .4rem}
figure,tr{break-inside:avoid}}
"""


def _page(result: Experiment, pictures: Mapping[str, tuple[str, str]], seconds: float) -> str:
    shown = {
        name: f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}'
        "</figcaption></figure>"
        for name, (caption, data) in pictures.items()
    }
    facts = ", ".join(f"{k} {v}" for k, v in versions().items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>evengaze demo</title><style>{_CSS}</style>
<h1>evengaze demo</h1>
<p class="lead">{html.escape(headline(result))}</p>
{shown.get("kept.png", "")}
<h2>Accuracy against tokens</h2>
{shown["accuracy.png"]}
<div class="scroll">{_settings_table(result)}</div>
<p class="note">Differences are paired, in points, with 95 % bootstrap intervals over questions. Time is that of
<code>generate</code> on this machine, all settings taking turns. Many settings are compared: one interval that just
excludes zero proves little. Where a baseline is ahead of both debias steps, the attention at that layer does not say
where the answer is, and no debiasing can change that.</p>
<h2>The trend</h2>
{shown["trend.png"]}
<h2>Bias by layer</h2>
<div class="scroll">{_bias_table(result.calibration.bias)}</div>
<p class="note">Measured on the calibration pictures: sigma and R² of the exponential fit, Spearman correlation of
score and raster index, where {100 * KEEPS[1]:g} % of the tokens would be kept, and the attention that padding gets
relative to content at the same positions. Layers count from 0; tokens that leave before layer {LAYER} are ranked by
layer {LAYER - 1}.</p>
<h2>By type of question</h2>
<div class="scroll">{_types_table(result)}</div>
<p class="note">The model is tiny and its pictures are synthetic: it shows how the methods work, not what they are
worth on a large model. Its bias was inherited from its language model, not planted.
{seconds:.0f} s in all, computed in {result.dtype}; {facts}.</p>
</html>
"""


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], tops: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr{' class=top' if i in tops else ''}>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>"
        for i, line in enumerate(lines)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _settings_table(result: Experiment) -> str:
    heads = ("setting", "kept", "accuracy %", "against dense", "against plain", "average tokens", "time s")
    lines: list[Sequence[str]] = []
    tops: list[int] = []
    for row in rows(result):
        if row.cell is None or row.cell.label == "plain":
            tops.append(len(lines))
        low, high = row.ci95
        lines.append(
            (
                "dense" if row.cell is None else row.cell.label,
                kept(row.cell),
                f"{points(row.accuracy)} [{points(low)}, {points(high)}]",
                difference(row.against_dense),
                difference(row.against_plain),
                f"{row.average_tokens:.1f}",
                f"{row.seconds:.1f}",
            )
        )
    return _table(heads, lines, tops)


_BIAS = {
    "layer": ("layer", "d"),
    "sigma": ("sigma", ".2f"),
    "r2": ("R²", ".2f"),
    "spearman": ("Spearman", "+.2f"),
    "kept_bottom": ("kept in bottom half", ".0%"),
    "kept_padding": ("padding among kept", ".0%"),
    "padding_ratio": ("padding / content", ".2f"),
}


def _bias_table(bias: Sequence[Mapping[str, float]]) -> str:
    lines = [[format(layer[k], form) if k in layer else "" for k, (_, form) in _BIAS.items()] for layer in bias]
    return _table([head for head, _ in _BIAS.values()], lines)


def _types_table(result: Experiment) -> str:
    named = {"dense": result.dense}
    named |= {f"{kept(c)} {c.label}": o for c, o in result.cells if (c.keep, c.layer) == (KEEPS[1], LAYER)}
    found = {name: by_type(result, outcome) for name, outcome in named.items()}
    count = {kind: sum(q.type == kind for q in result.questions) for kind in found["dense"]}
    lines = [[f"{kind} ({count[kind]})", *(points(v[kind]) for v in found.values())] for kind in count]
    return _table(["type (questions)", *found], lines)
