"""`evengaze plan`: what methods will cost, before anything is downloaded or loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from evengaze.cli import output, tables, terminal
from evengaze.cli.options import AsJson, Revision

DEFAULT = "fastv:keep=0.5;fastv:keep=0.25;fastv:keep=0.125"
_VISUAL, _LAYERS = 576, 32


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    methods: Annotated[
        list[str] | None, typer.Option("--methods", "-m", help="E.g. 'fastv:keep=64;himap'; repeatable.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, local folder, 'demo' or a shape such as qwen2.5-vl-7b; only the config is read. Default: "
            "llava-1.5-7b."
        ),
    ] = None,
    visual: Annotated[
        int | None,
        typer.Option(
            "--visual-tokens",
            min=1,
            help="Visual tokens of the prompt. Default: of one picture, if that is fixed.",
        ),
    ] = None,
    text: Annotated[int, typer.Option("--text-tokens", min=0, help="Text tokens of the prompt.")] = 64,
    budget: Annotated[
        float | None, typer.Option(min=1, help="Bring every method to this average of visual tokens a layer.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a decoding step; FLOPs and cache are those of one.")] = 1,
    cache_bits: Annotated[int, typer.Option(min=1, help="Bits of one number in the cache.")] = 16,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Average tokens, FLOPs and key/value cache of methods on a prompt of a given size, in a second.

    Nothing is loaded and nothing is timed: for what a machine makes of it, see `evengaze profile`. FLOPs are those of
    the decoder's prefill; the vision tower's come on top, the same for all methods that do not prune in it. A decoding
    step reads the decoder's matrices and every row's cache.
    """
    from evengaze.errors import ConfigError
    from evengaze.methods import parse, split
    from evengaze.methods import spec as spelled
    from evengaze.profile.plan import depth_of, picture_tokens
    from evengaze.profile.plan import plan as costs_of
    from evengaze.schedule import DecoderShape, solve_for_budget

    pruners = {one: parse(one) for one in split(methods or [DEFAULT])}
    shape, layers = DecoderShape(), _LAYERS
    if model is None:
        visual = visual or _VISUAL
    else:
        from evengaze.cli import session

        config = session.config_of(model, revision, shapes=True)
        shape, layers = DecoderShape.from_config(config), depth_of(config)
        visual = visual or picture_tokens(config)
        if visual is None:
            raise ConfigError(
                f"--visual-tokens is needed: the visual tokens of {config.model_type} depend on the pictures' sizes. "
                "`evengaze run` says how many a picture of yours has"
            )
    if budget is not None:
        solved = [solve_for_budget(one, budget, layers=layers, visual=visual) for one in pruners.values()]
        pruners = {spelled(one): one for one in solved}
    every = {"dense": parse("dense"), **pruners}
    costs = costs_of(every, shape, layers, visual, text, entry_bytes=cache_bits / 8, batch=batch)
    if as_json:
        found = {
            "layers": layers,
            "visual": visual,
            "text": text,
            "batch": batch,
            "methods": [one.to_dict() for one in costs],
        }
        terminal.echo(terminal.as_json(found))
        return
    title = f"{model or 'LLaVA-1.5-7B'}: {layers} layers, {visual} visual and {text} text tokens"
    terminal.echo(_table(costs, title))
    terminal.echo("")
    terminal.echo("\n".join(tables.lines([_steps(costs, batch)])))
    if output.voice.verbose:
        for one in every.values():
            output.detail(one.schedule(layers, visual).describe(shape, text))


def _steps(costs: list[Any], batch: int) -> str:
    """What decoding reads, in a sentence."""
    dense, *others = costs
    shares = "; ".join(f"{one.method} {tables.together(f'{one.step_share:.0%} of that')}" for one in others)
    rows = "one row" if batch == 1 else f"{batch} rows"
    return f"A decoding step of {rows} reads {dense.step_bytes / 1e9:.2f} GB of weights and cache; {shares}."


def _table(costs: list[Any], title: str) -> str:
    columns = [
        tables.name("method"),
        *map(tables.Column, ("average tokens", "TFLOPs", "FLOPs", "KV cache MB", "KV cache")),
        tables.text("visual tokens"),
    ]
    rows = [
        [
            one.method,
            f"{one.average_tokens:.1f}",
            f"{one.flops / 1e12:.3g}",
            f"{one.flops_share:.1%}",
            f"{one.kv_bytes / 1e6:.1f}",
            f"{one.kv_share:.1%}",
            one.steps,
        ]
        for one in costs
    ]
    return tables.table(columns, rows, title=title)
