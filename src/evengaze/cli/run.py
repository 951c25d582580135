"""`evengaze run` and `evengaze compare`: one question about one's own picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import output, terminal
from evengaze.cli.options import AsJson, loads_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from evengaze.cli.session import Answered, Session
    from evengaze.evaluate.spec import ModelSpec
    from evengaze.methods import Pruner
    from evengaze.viz.compare import Compared

Images = Annotated[list[Path], typer.Option("--image", "-i", help="Picture; repeat for several.")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The question, without image marker.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("run")(run)
    app.command("compare")(compare)


@loads_model
def run(
    spec: ModelSpec,
    image: Images,
    prompt: Prompt,
    method: Annotated[
        str, typer.Option("--method", "-m", help="E.g. fastv:keep=128,layer=2, or none; see `evengaze list methods`.")
    ] = "fastv:keep=0.25",
    debias: Annotated[
        str | None, typer.Option(help="padding, a preset's name (`evengaze list presets`), or curve.json.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write what was kept as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the picture with the kept patches (.png, .pdf, .svg).")
    ] = None,
    max_new_tokens: NewTokens = 64,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a picture with most of its tokens dropped."""
    from evengaze.cli import session

    session.check_output(trace, ".json")
    session.check_output(plot, *session.FIGURES)
    pruner, pictures = session.method(method, debias), session.read_pictures(image)
    session.check_stages([pruner], spec)
    session.note_on_demo(spec)
    loaded = session.Session(spec)
    answer = loaded.answer(pictures, prompt, pruner, max_new_tokens)
    if as_json:
        terminal.echo(terminal.as_json(_described(answer, pruner.to_dict())))
    else:
        terminal.echo(answer.text)
    if answer.trace is None:
        return
    output.note(f"{answer.trace}; {answer.seconds:.2f} s")
    entering = answer.trace.visual_tokens(0)
    if pruner.name != "dense" and min(entering) == len(answer.trace.layout.rows[0]):
        output.note(f"{method} keeps all {min(entering)} visual tokens: nothing was dropped")
    if trace is not None:
        answer.trace.save(trace)
    if plot is not None:
        from evengaze.viz.style import save

        save(answer.trace.plot(pictures if len(pictures) > 1 else pictures[0]), plot)
        output.note(plot)


@loads_model
def compare(
    spec: ModelSpec,
    image: Images,
    prompt: Prompt,
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure (.png, .pdf, .svg).")] = Path("compare.png"),
    methods: Annotated[
        list[str] | None, typer.Option("--methods", "-m", help="E.g. 'fastv:keep=64;random'; repeatable.")
    ] = None,
    debias: Annotated[
        str | None, typer.Option(help="Curve to debias with: padding, a preset's name, or curve.json.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="The right answer, to mark right and wrong ones; default: as the model says with all tokens."
        ),
    ] = None,
    max_new_tokens: NewTokens = 64,
    as_json: AsJson = False,
) -> None:
    """Draw what each method keeps of a picture, plain and debiased, in one grid.

    Without --debias the second row leaves out padding only. Methods that do not rank by text are drawn once.
    """
    from evengaze.cli import session
    from evengaze.methods import split
    from evengaze.viz.compare import plot_comparison
    from evengaze.viz.style import save

    session.check_output(out, *session.FIGURES)
    named = split(methods or ["fastv:keep=0.125;pyramiddrop;random:keep=0.125;uniform:keep=0.125"])
    pruners = [session.method(text, debias) for text in named]
    pictures = session.read_pictures(image)
    session.check_stages(pruners, spec)
    session.note_on_demo(spec)
    loaded = session.Session(spec)
    dense = loaded.answer(pictures, prompt, session.method("dense"), max_new_tokens)
    right = dense.text if answer is None else answer
    columns: list[list[Compared | None]] = []
    for text, pruner in zip(named, pruners, strict=True):
        plain = pruner.replace(debias=None)
        column = [_one(loaded, pictures, prompt, plain, text, max_new_tokens, right), None]
        if plain.ranked_stages(loaded.layers):
            better = session.method(text, "padding") if pruner.debias is None else pruner
            column[1] = _one(loaded, pictures, prompt, better, "debiased", max_new_tokens, right)
        columns.append(column)
    if all(column[1] is None for column in columns):
        columns = [column[:1] for column in columns]
    figure = plot_comparison(columns, pictures[0], question=prompt, dense=dense.text, right=answer or "")
    save(figure, out)
    runs = [one for column in columns for one in column if one is not None]
    if as_json:
        found = [{"label": one.label, "answer": one.answer, "right": one.right} for one in runs]
        terminal.echo(terminal.as_json({"figure": str(out), "all_tokens": dense.text, "runs": found}))
        return
    terminal.echo(f"all tokens: {dense.text}")
    for one in runs:
        terminal.echo(f"{one.label}: {one.answer}")
    output.note(out)


def _one(
    loaded: Session,
    pictures: list[Image],
    prompt: str,
    pruner: Pruner,
    label: str,
    max_new_tokens: int,
    right: str,
) -> Compared | None:
    from evengaze.errors import NothingPrunedError
    from evengaze.viz.compare import Compared

    answer = loaded.answer(pictures, prompt, pruner, max_new_tokens)
    if answer.trace is None:
        raise NothingPrunedError("the prompt has no visual tokens, so there is nothing to compare")
    return Compared(label, answer.trace, answer.text, _said(answer.text) == _said(right))


def _said(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!")


def _described(answer: Answered, method: dict[str, Any]) -> dict[str, Any]:
    trace = answer.trace
    found = {"answer": answer.text, "seconds": round(answer.seconds, 4), "method": method}
    if trace is None:
        return found
    return found | {
        "visual_tokens": trace.visual_tokens(0),
        "average_tokens": trace.average_tokens(0),
        "kept": trace.kept(0).tolist() if trace.stages else None,
        "kv_bytes": sum(trace.kv_bytes),
        "kv_bytes_unpruned": sum(trace.kv_bytes_unpruned),
    }
