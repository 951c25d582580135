"""`evengaze demo`: the whole product in a few minutes, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evengaze.cli import output, terminal

if TYPE_CHECKING:
    from evengaze.demo.experiment import Experiment

_QUESTIONS = 200


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html and the pictures.")] = Path(
        "evengaze-demo"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file; '-' prints them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help=f"Ask so many questions (default {_QUESTIONS}).")] = None,
    full: Annotated[bool, typer.Option("--full", help="Ask all questions of the evaluation set.")] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where this machine is clearly faster in it.")
    ] = "auto",
) -> None:
    """Prune the embedded model with and without debiasing, and report accuracy, tokens and time.

    Calibrates the trend on pictures of its own, then asks the same questions of the dense model and of FastV at
    three budgets, plain and debiased, beside random and uniform baselines.
    """
    import json
    from time import perf_counter

    from evengaze.extras import require

    require("cli", "the demo", "jinja2", "matplotlib", "scipy")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from evengaze.cli.session import check_folder, check_output
    from evengaze.errors import ConfigError

    if full and limit is not None:
        raise ConfigError("--full asks all questions; give it or --limit, not both")
    check_output(None if str(json_file) == "-" else json_file)
    check_folder(out)
    start = perf_counter()
    from evengaze.demo import load, make_dataset, report
    from evengaze.demo.experiment import calibrate, run, settings
    from evengaze.demo.model import choose_dtype, dtype_of
    from evengaze.files import write_whole

    console = terminal.Screen(quiet=output.voice.quiet, stderr=str(json_file) == "-")
    model, processor = load(choose_dtype(dtype))
    pictures = make_dataset("eval")
    number = sum(len(p.questions) for p in pictures)
    count = number if full else min(limit or _QUESTIONS, number)
    console.print(
        f"Embedded model: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {dtype_of(model)}; "
        f"{count} questions about synthetic pictures (it knows no others), {len(settings())} settings and the dense "
        "model",
    )
    columns = (terminal.Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal.Screen(stderr=True), transient=True) as progress:
        task = progress.add_task("calibrating", total=None)
        calibration = calibrate(model, processor, make_dataset("calibration"))
        progress.reset(task, description="answers", total=count * (1 + len(settings())))
        result = run(model, processor, pictures, calibration, limit=count, advance=lambda n: progress.advance(task, n))
    console.print(
        f"Calibrated on {calibration.samples} other pictures in {calibration.seconds:.0f} s: "
        f"{calibration.curve.trend.family} trend at layer {calibration.curve.origin.layer}",
    )
    console.print(_table(result), soft_wrap=True)
    seconds = perf_counter() - start
    page = report.write(result, out, seconds)
    figures = json.dumps(report.to_dict(result, seconds), indent=1)
    if str(json_file) == "-":
        terminal.echo(figures)
    elif json_file is not None:
        write_whole(json_file, figures + "\n")
    console.print(report.headline(result))
    console.print(f"{perf_counter() - start:.0f} s in all.")
    if str(json_file) != "-":
        terminal.echo(f"Report: {page}")


def _table(result: Experiment) -> str:
    from evengaze.cli import tables
    from evengaze.demo.report import difference, kept, points, rows

    heads = ("%", "against dense", "against plain", "tokens", "s")
    columns = [tables.name("kept"), tables.name("setting"), *map(tables.Column, heads)]
    lines: list[list[str]] = []
    last = ""
    for row in rows(result):
        share = kept(row.cell)
        if last not in ("", share):
            lines.append([])
        lines.append(
            [
                "" if share == last else share,
                "dense" if row.cell is None else row.cell.label,
                points(row.accuracy),
                difference(row.against_dense),
                difference(row.against_plain),
                f"{row.average_tokens:.1f}",
                f"{row.seconds:.0f}",
            ]
        )
        last = share
    return tables.table(columns, lines)
