"""`evengaze evaluate` and `evengaze report`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evengaze.cli import output, tables, terminal
from evengaze.cli.options import AsJson, overrides_model
from evengaze.cli.output import INTERRUPTED, RECORDS_LOST, TERMINATED
from evengaze.errors import ConfigError, DataError

_SCORE = 6
"""Characters of a score."""

console = terminal.Screen(stderr=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("evaluate")(evaluate)
    app.command("report")(report)


@overrides_model
def evaluate(
    loading: dict[str, Any],
    benchmarks: Annotated[
        list[str] | None, typer.Option("--benchmarks", "-b", help="Comma-separated; repeatable.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder that holds playground/data/eval or eval/GPT_Zero_Shot_QA.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Answers and results go here; give it again to resume.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "-m", help="E.g. 'none,fastv:keep=128', or with ';'; repeatable."),
    ] = None,
    debias: Annotated[
        list[str] | None,
        typer.Option(help="none, padding, preset, published, a preset's name or curve.json; comma-separated."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Average visual tokens a layer to bring every method to: '64,128,192'.")
    ] = None,
    baselines: Annotated[str | None, typer.Option(help="At every method's average tokens; '' for none.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only so many questions of each benchmark.")] = None,
    shuffle_seed: Annotated[int | None, typer.Option(help="Draw them at random; default: the first ones.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions a generate call (default 8).")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: as in each benchmark's official script.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="auto, official (LLaVA's templates) or chat (the model's).")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="YAML file, or the name of a shipped one, with any of these options.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="MM-Vet, video: model that judges (through an API).")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Base URL of the judge's OpenAI-compatible server.")] = None,
    judge_local: Annotated[str | None, typer.Option(help="Judge with a model run here through transformers.")] = None,
    ray: Annotated[str | None, typer.Option(help="Run on Ray: 'local', 'auto' or a cluster's address.")] = None,
    ray_actors: Annotated[int, typer.Option(min=1, help="Copies of the model on Ray.")] = 1,
    ray_gpus: Annotated[float | None, typer.Option(help="GPUs a copy (default: 1 if the cluster has any).")] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPUs a copy.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Answer benchmarks with methods x debiasing x budgets, score them, and compare.

    Killed or interrupted runs go on where they stopped when the same command is given again. Exit status: 0; 2 for an
    error; 3 if records could not be read or a cell failed (the rest is there); 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    from evengaze.cli.score import make_judge, say
    from evengaze.evaluate.benchmarks import ScoreOptions
    from evengaze.evaluate.recipes import Recipe

    given = {
        "prompt": prompt,
        "benchmarks": _names(benchmarks),
        "methods": methods,
        "debias": _names(debias),
        "budgets": None if budgets is None else _numbers(budgets),
        "baselines": None if baselines is None else _names([baselines]),
        "limit": limit,
        "shuffle_seed": shuffle_seed,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    settings = Recipe.load(recipe) if recipe is not None else Recipe()
    settings = settings.overridden(loading | {key: value for key, value in given.items() if value is not None})
    missing = [name for name, value in (("--data", data), ("--out", out)) if value is None]
    missing += [] if settings.model.source else ["--model"]
    missing += [] if settings.benchmarks else ["--benchmarks"]
    if data is None or out is None or missing:
        raise ConfigError(f"evaluate needs {', '.join(missing)}; see `evengaze evaluate --help`")
    check_plan(settings, data, out)
    options = ScoreOptions(judge=make_judge(judge, judge_url, judge_local), cache=out / "judge.jsonl", say=say)
    if ray is None:
        from evengaze.evaluate.predictor import Predictor
        from evengaze.evaluate.runner import LocalBackend

        backend: Any = LocalBackend(Predictor.load(settings.model))
    else:
        from evengaze.evaluate.ray_runner import RayBackend

        backend = RayBackend(settings.model, ray, actors=ray_actors, gpus=ray_gpus, cpus=ray_cpus)
    raise typer.Exit(_run(settings, data, out, backend, options, as_json))


def check_plan(settings: Any, data: Path, out: Path) -> None:
    """Find out before a model is loaded whether methods, their layers, debiasing, files and folders are right."""
    from evengaze.cli import session
    from evengaze.debias import Debias
    from evengaze.evaluate.benchmarks import get_benchmark

    pruners = [session.method(text) for text in settings.plan.methods]
    for label in settings.plan.debias:
        if label not in ("none", "preset", "published"):
            Debias.parse(label)
    for name in settings.plan.baselines:
        session.method(name)
    chosen = [get_benchmark(name) for name in settings.benchmarks]
    session.check_stages(pruners, settings.model)
    for benchmark in chosen:
        benchmark.check(data)
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder")


def _run(settings: Any, data: Path, out: Path, backend: Any, options: Any, as_json: bool) -> int:
    """Run all benchmarks; returns the exit status."""
    from evengaze.evaluate.benchmarks import get_benchmark
    from evengaze.evaluate.grid import prepare, run_grid
    from evengaze.evaluate.results import short
    from evengaze.evaluate.runner import rank_and_world

    chosen = [get_benchmark(name) for name in settings.benchmarks]
    try:
        with _terminable():
            tasks = prepare(settings.plan, chosen, data, backend)
            with _progress() as progress:
                world = rank_and_world()[1]
                work = {t.benchmark.name: len(t.cells) * settings.setting.count(len(t.records)) / world for t in tasks}
                total = progress.add_task("all", total=sum(work.values()))
                bars = {name: progress.add_task(name, total=count) for name, count in work.items()}
                for task in tasks:
                    for line in task.notes:
                        progress.console.print(line)

                def advance(task: Any, cell: Any, count: int) -> None:
                    name = task.benchmark.name
                    better = "" if cell.debias == "none" else f" + {short(cell.debias)}"
                    progress.update(bars[name], advance=count, description=f"{name} {cell.method}{better}")
                    progress.advance(total, count)

                rows = run_grid(tasks, data, out, backend, settings.setting, options=options, advance=advance)
    except (KeyboardInterrupt, Terminated) as end:
        word, status = (
            ("Interrupted", INTERRUPTED) if isinstance(end, KeyboardInterrupt) else ("Terminated", TERMINATED)
        )
        console.print(f"{word}. All answers up to here are in {out}; give the same command again to go on.")
        return status
    return _show(rows, out, as_json)


class Terminated(BaseException):
    """The process was asked to end (SIGTERM), as batch systems do when a job's time is over."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that files are closed and it is said what is kept."""

    def end(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(rows: list[Any], out: Path, as_json: bool = False) -> int:
    """Print the tables and everything that went wrong; returns the exit status."""
    from evengaze.evaluate.results import FLIPPED
    from evengaze.evaluate.results import tables as compared

    screen = terminal.Screen(stderr=as_json)
    if as_json:
        terminal.echo(
            terminal.as_json([{**asdict(row.result), "folder": str(row.folder)} for row in rows], default=str)
        )
    for table in compared(rows):
        columns = [
            tables.name("method"),
            *map(tables.Column, ("tokens", "FLOPs", "score", "n")),
            *(tables.Column(head, text=True) for head in ("debias - plain", "against dense")),
            tables.Column("as dense"),
        ]
        lines = [_line(row) for row in table.rows]
        if not as_json:
            terminal.echo(tables.table(columns, lines, title=f"{table.title} {table.split}: {table.metric}") + "\n")
            for part in _by_category(table):
                terminal.echo(part + "\n")
        for row in table.rows:
            row.save_flips()
    lost, warned = False, dict[str, list[str]]()
    if any(row.result.waiting for row in rows):
        screen.print("Some answers are still with other processes; the last one to finish scores.")
    for row in rows:
        result = row.result
        name = f"{result.benchmark.name} {row.title}"
        if result.problem and (result.failed or not result.waiting):
            screen.print(f"{name}: {result.problem}")
            lost = True
        if result.errors:
            first = next(iter(result.errors.values()))
            count = f"{len(result.errors)} record(s) could not be read or answered"
            screen.print(f"{name}: {count} (listed in errors.jsonl), e.g. {first}")
            lost = True
        score = result.summary
        for note in [*result.notes, *(score.warnings if score is not None else [])]:
            warned.setdefault(note, []).append(name)
    for note, (first, *others) in warned.items():
        screen.print(f"Warning: {first}{f' and {len(others)} more' if others else ''}: {note}", style="yellow")
    if any(row.agreement is not None and row.agreement.flips for row in rows):
        screen.print(f"Answers that are not the dense model's: {FLIPPED} in each method's folder.")
    screen.print(f"Results in {out}; `evengaze report {quote(str(out))} -o report` makes tables and figures.")
    return RECORDS_LOST if lost else 0


def _line(row: Any) -> list[str]:
    """A row of the table."""
    flops, score = row.result.tokens.get("relative_flops"), row.result.summary
    return [
        row.title,
        "-" if row.average is None else f"{row.average:.1f}",
        "-" if flops is None else f"{flops:.1%}",
        "-" if row.value is None else f"{row.value:.2f}",
        str(row.result.answered if score is None else score.n_scored),
        _difference(row.against_plain),
        _difference(row.against_dense),
        "" if row.agreement is None else f"{row.agreement.share:.1%}",
    ]


def _by_category(table: Any) -> list[str]:
    """Scores by category, in as many tables as the screen is too narrow for one."""
    found, left = [], list(table.categories)
    rows = [row for row in table.rows if row.result.summary is not None]
    while left:
        now = [left.pop(0)]
        while left and sum(max(len(name), _SCORE) + len(tables.GAP) for name in (*now, left[0])) <= tables.width():
            now.append(left.pop(0))
        columns = [tables.name("method"), *map(tables.Column, now)]
        lines = [[row.title, *(_score(row.result.summary.breakdown.get(name)) for name in now)] for row in rows]
        found.append(tables.table(columns, lines, title=f"{table.title} {table.split} by category"))
    return found


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _difference(paired: Any) -> str:
    """Points with interval and p-value."""
    if paired is None:
        return ""
    interval = tables.together(f"[{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]")
    return f"{100 * paired.delta:+.1f} {interval} p={paired.p_value:.2g}"


def report(
    results: Annotated[Path, typer.Argument(help="The --out folder of one or several evaluations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html, report.md and the figures.")] = Path(
        "report"
    ),
    published: Annotated[bool, typer.Option(help="Set published numbers beside the measured ones.")] = True,
    as_json: AsJson = False,
) -> None:
    """Make tables and figures of an evaluation: Markdown, one self-contained HTML page, PNG, SVG and PDF."""
    if not results.is_dir():
        raise DataError(f"{results} is not a directory. Give the --out folder of `evengaze evaluate`.")
    from evengaze.cli.session import check_folder
    from evengaze.evaluate.report import write_report

    if out.exists():
        check_folder(out)
    written = write_report(results, out, published=published)
    if as_json:
        terminal.echo(terminal.as_json([str(path) for path in written]))
        return
    for path in written:
        terminal.echo(path)


def _progress() -> Progress:
    return Progress(
        terminal.Description(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=output.voice.quiet,
    )


def _names(values: list[str] | None) -> list[str] | None:
    if values is None:
        return None
    return [part.strip() for value in values for part in value.replace(";", ",").split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--budgets {text!r}: give numbers separated by commas, such as 64,128,192") from None
