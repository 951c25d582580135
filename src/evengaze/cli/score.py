"""`evengaze score` and `evengaze list benchmarks`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import output, tables, terminal
from evengaze.errors import ConfigError

if TYPE_CHECKING:
    from evengaze.evaluate.benchmarks import Score
    from evengaze.evaluate.judge import Judge

_SHOWN = 5


def score(
    benchmark: Annotated[str, typer.Argument(help="Benchmark; see `evengaze list benchmarks`.")],
    answers: Annotated[Path, typer.Option(help="Predictions, JSON lines in LLaVA's or Video-LLaVA's format.")],
    data: Annotated[Path, typer.Option(help="Folder that holds playground/data/eval or eval/GPT_Zero_Shot_QA.")],
    mode: Annotated[str, typer.Option(help="default, or official: the official scorer's number, quirks included.")] = (
        "default"
    ),
    rule: Annotated[str | None, typer.Option(help="MMBench: letter, vlmevalkit or lmms-eval.")] = None,
    consistency: Annotated[bool, typer.Option("--consistency", help="GQA: also score consistency.")] = False,
    judge: Annotated[str | None, typer.Option(help="MM-Vet, video: model that judges (through an API).")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Base URL of the judge's OpenAI-compatible server.")] = None,
    judge_local: Annotated[str | None, typer.Option(help="Judge with a model run here through transformers.")] = None,
    judge_cache: Annotated[Path | None, typer.Option(help="Keep the judge's replies in this file; resumes.")] = None,
    judged: Annotated[Path | None, typer.Option(help="Judgements made before, in the official format.")] = None,
    runs: Annotated[int, typer.Option(help="MM-Vet: how often each answer is judged.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Calls to the judge at a time.", min=1)] = 8,
    submission: Annotated[Path | None, typer.Option(help="Also write the file that the server takes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Score a predictions file, whichever program wrote it.

    Exit status: 0; 2 for an error; 3 if there is a number, but answers are missing, unknown, malformed or not judged.
    """
    from evengaze.evaluate.benchmarks import ScoreOptions
    from evengaze.evaluate.scoring import score_file
    from evengaze.files import write_whole

    for path in (out, submission):
        if path is not None:
            output.replaces(path)
    options = ScoreOptions(
        rule=rule,
        consistency=consistency,
        judge=make_judge(judge, judge_url, judge_local),
        judged=judged,
        cache=judge_cache,
        runs=runs,
        workers=workers,
        say=say,
    )
    result = score_file(benchmark, answers, data, mode, options, submission)  # type: ignore[arg-type]
    text = terminal.as_json(result.to_dict())
    if out is not None:
        write_whole(out, text + "\n")
    if as_json:
        terminal.echo(text)
    else:
        _show_score(result, terminal.Screen())
    if any((result.problems.missing, result.problems.unknown, result.problems.malformed, result.problems.errors)):
        raise typer.Exit(output.RECORDS_LOST)


def list_benchmarks(
    names: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder to look for the datasets in.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List benchmarks: split, metric, the files they need, which are missing and where to get them."""
    from evengaze.evaluate import scoring

    items = scoring.list_benchmarks(data, names or ())
    if as_json:
        terminal.echo(terminal.as_json(items))
        return
    console = terminal.Screen()
    columns = [tables.name("name"), *map(tables.text, ("split", "metric", "ready to" if data else "files"))]
    rows = [[item["name"], item["split"], item["metric"], _readiness(item)] for item in items]
    terminal.echo(tables.table(columns, rows))
    for item in items:
        wanted = [entry for entry in item["files"] if not entry.get("present", False)]
        if wanted:
            console.labelled(f"\n{item['name']}", f" {'lacks' if data else 'needs'}, in {item['layout']}:", "bold")
        for entry in wanted:
            terminal.echo(_wanted(entry))


def register(app: typer.Typer, listing: typer.Typer | None = None) -> None:
    """Add the commands to an app.

    Args:
        app: Gets `score`, and a `list` group when none is given.
        listing: The group of `list` commands, gets `benchmarks`.
    """
    app.command()(score)
    if listing is None:
        listing = typer.Typer(help="List what there is.", no_args_is_help=True)
        app.add_typer(listing, name="list")
    listing.command("benchmarks")(list_benchmarks)


def make_judge(model: str | None, url: str | None, local: str | None) -> Judge | None:
    """The judge that the options of `score` and `evaluate` name, or None.

    Raises:
        ConfigError: they contradict each other.
    """
    from evengaze.evaluate.judge import LocalJudge, OpenAIJudge

    if model and local:
        raise ConfigError("--judge and --judge-local exclude each other.")
    if url and not model:
        raise ConfigError("--judge-url needs --judge MODEL.")
    if local:
        return LocalJudge(local)
    return OpenAIJudge(model, base_url=url, say=say) if model else None


def say(line: str) -> None:
    """Tell how judging goes, beside the results."""
    terminal.secho(line, err=True, dim=True)


def _show_score(result: Score, console: terminal.Screen) -> None:
    value = "not scored" if result.value is None else f"{result.value:.2f}"
    console.print(f"{result.benchmark} {result.split}, {result.metric}: {value}", style="bold")
    console.print(f"{result.n_scored} of {result.n_records} records scored, {result.mode} mode")
    for name, number in result.breakdown.items():
        console.print(f"  {name}: {number:.1f}")
    for name, number in result.offline.items():
        console.print(f"  offline {name}: {number:.2f}")
    for name in ("missing", "duplicate", "unknown"):
        keys = getattr(result.problems, name)
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            console.labelled(f"{len(keys)} {name}", f": {', '.join(keys[:_SHOWN])}{more}", "yellow")
    for item in result.problems.malformed[:_SHOWN]:
        console.labelled(f"line {item['line']}", f": {item['reason']}", "yellow")
    for item in result.problems.errors[:_SHOWN]:
        console.labelled(f"{item['key']} not judged", f": {item['error']}", "red")
    for warning in result.warnings:
        console.print(f"Warning: {warning}", style="yellow")
    for note in result.notes:
        console.print(f"note: {note}")


def _readiness(item: dict[str, Any]) -> str:
    if "can_run" not in item:
        return str(len(item["files"]))
    ready = [name for name, key in (("run", "can_run"), ("score", "can_score")) if item[key]]
    note = ", ".join(ready) or "-"
    if isinstance(item["missing_media"], str):
        return f"{note} ({item['missing_media']})"
    return f"{note} ({item['missing_media']} images or videos missing)" if item["missing_media"] else note


def _wanted(entry: dict[str, Any]) -> str:
    """A file and where it is from, on a line of its own if there is no room beside."""
    file, source = f"  {entry['path']} (to {_use(entry['needed'])})", entry["source"]
    if len(f"{file}: {source}") <= tables.width():
        return f"{file}: {source}"
    return "\n    ".join([file, *tables.lines([source], limit=tables.width() - 4)])


def _use(needed: str) -> str:
    return {"both": "run and score", "optional": "add detail"}.get(needed, needed)
