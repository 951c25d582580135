"""`evengaze run` and `evengaze compare`: one question about one's own picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evengaze.cli import terminal
from evengaze.cli.options import AllowMissing, Device, DType, Model, Revision

if TYPE_CHECKING:
    from PIL.Image import Image

    from evengaze.cli.session import Session
    from evengaze.methods import Pruner
    from evengaze.viz.compare import Compared

Images = Annotated[list[Path], typer.Option("--image", "-i", help="Picture; repeat for several.")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The question, without image marker.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("run")(run)
    app.command("compare")(compare)


def run(
    image: Images,
    prompt: Prompt,
    model: Model = "demo",
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
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> None:
    """Answer a question about a picture with most of its tokens dropped."""
    from evengaze.cli import session

    session.output(trace, ".json")
    session.output(plot, ".png", ".pdf", ".svg")
    pruner, pictures = session.method(method, debias), session.read_pictures(image)
    loaded = session.Session(model, revision=revision, dtype=dtype, device=device, allow_missing=allow_missing)
    answer = loaded.answer(pictures, prompt, pruner, max_new_tokens)
    terminal.echo(answer.text)
    if answer.trace is None:
        return
    terminal.secho(f"{answer.trace}; {answer.seconds:.2f} s", err=True, dim=True)
    if trace is not None:
        answer.trace.save(trace)
    if plot is not None:
        answer.trace.plot(pictures if len(pictures) > 1 else pictures[0]).savefig(plot)
        terminal.secho(f"{plot}", err=True, dim=True)


def compare(
    image: Images,
    prompt: Prompt,
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure (.png, .pdf, .svg).")] = Path("compare.png"),
    methods: Annotated[
        list[str] | None, typer.Option("--methods", "-m", help="E.g. 'fastv:keep=64,layer=2;random:keep=64'.")
    ] = None,
    debias: Annotated[
        str | None, typer.Option(help="Curve to debias with: padding, a preset's name, or curve.json.")
    ] = None,
    model: Model = "demo",
    max_new_tokens: NewTokens = 64,
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> None:
    """Draw what each method keeps of a picture, plain and debiased, in one grid.

    Without --debias the second row leaves out padding only. Methods that do not rank by text are drawn once.
    """
    from evengaze.cli import session
    from evengaze.methods import split
    from evengaze.viz.compare import plot_comparison

    session.output(out, ".png", ".pdf", ".svg")
    specs = split(methods or ["fastv:keep=0.125;pyramiddrop;random:keep=0.125;uniform:keep=0.125"])
    pruners = [session.method(spec, debias) for spec in specs]
    pictures = session.read_pictures(image)
    loaded = session.Session(model, revision=revision, dtype=dtype, device=device, allow_missing=allow_missing)
    dense = loaded.answer(pictures, prompt, session.method("dense"), max_new_tokens)
    columns: list[list[Compared | None]] = []
    for spec, pruner in zip(specs, pruners, strict=True):
        plain = pruner.replace(debias=None)
        column = [_one(loaded, pictures, prompt, plain, spec, max_new_tokens), None]
        if plain.ranked_stages(loaded.layers):
            better = session.method(spec, "padding") if pruner.debias is None else pruner
            column[1] = _one(loaded, pictures, prompt, better, "debiased", max_new_tokens)
        columns.append(column)
    if all(column[1] is None for column in columns):
        columns = [column[:1] for column in columns]
    plot_comparison(columns, pictures[0], question=prompt, dense=dense.text).savefig(out)
    terminal.echo(f"all tokens: {dense.text}")
    for column in columns:
        for one in column:
            if one is not None:
                terminal.echo(f"{one.label}: {one.answer}")
    terminal.secho(f"{out}", err=True, dim=True)


def _one(
    loaded: Session, pictures: list[Image], prompt: str, pruner: Pruner, label: str, max_new_tokens: int
) -> Compared | None:
    from evengaze.errors import NothingPrunedError
    from evengaze.viz.compare import Compared

    answer = loaded.answer(pictures, prompt, pruner, max_new_tokens)
    if answer.trace is None:
        raise NothingPrunedError("the prompt has no visual tokens, so there is nothing to compare")
    return Compared(label, answer.trace, answer.text)
