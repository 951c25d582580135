"""`evengaze doctor`: does it work with my model?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import tables, terminal

if TYPE_CHECKING:
    from evengaze.models.inspect import Diagnosis


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL_OR_PATH]", help="Hub id, local folder, or 'demo'; only its config is read."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say which adapter serves a model, where its layers are, and what does not work.

    Loads only the config; no code of a checkpoint is run. For a family without an adapter, prints the reason and an
    adapter to fill in, and ends with exit status 1. Without a model: every model type of the installed transformers.
    """
    import json
    from pathlib import Path

    from evengaze.demo.model import FOLDER
    from evengaze.engine import selfcheck
    from evengaze.errors import ConfigError, DataError, NoAdapterError, UnsupportedModelError
    from evengaze.models.inspect import diagnose, skeleton
    from evengaze.models.loading import load_config
    from evengaze.models.refusals import instead_of
    from evengaze.models.support import failing

    if model is None:
        _every_type(as_json)
        return
    where = str(FOLDER) if model == "demo" else str(Path(model).expanduser()) if model.startswith("~") else model
    if (where.startswith((".", "/")) or "/" not in where) and not Path(where).is_dir():
        raise ConfigError(f"there is no folder {where}; hub ids look like llava-hf/llava-1.5-7b-hf")
    distance = selfcheck.check()
    other = instead_of(where)
    try:
        config = load_config(where, revision=revision)
    except DataError as error:
        if other is None:
            raise
        raise DataError(f"{error} The same weights in transformers' format: {other}.") from None
    try:
        reason = failing(config.model_type)
        if reason is not None:
            raise UnsupportedModelError(reason)
        found = diagnose(config, where)
    except UnsupportedModelError as error:
        reason = str(error)
        if as_json:
            terminal.echo(json.dumps({"model_type": config.model_type, "supported": False, "reason": reason}, indent=2))
        else:
            terminal.secho(f"Not supported: {reason}", fg=typer.colors.RED)
            if isinstance(error, NoAdapterError):
                terminal.echo(f"\n# An adapter to fill in:\n\n{skeleton(config.model_type)}")
        raise typer.Exit(1) from None
    if as_json:
        terminal.echo(json.dumps(_as_dict(found), indent=2))
        return
    _show(found, distance)


def _every_type(as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from evengaze.models.support import all_support

    found = list(all_support())
    if as_json:
        terminal.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    columns = [tables.name("model type"), tables.name("pruning"), tables.text("adapter, or why not")]
    terminal.echo(tables.table(columns, [[row.model_type, row.how, row.adapter or row.reason] for row in found]))
    counts = {how: sum(row.how == how for row in found) for how in ("checked", "generic", "refused")}
    terminal.echo(f"{len(found)} types: " + ", ".join(f"{n} {how}" for how, n in counts.items()))


def _as_dict(found: Diagnosis) -> dict[str, Any]:
    from evengaze.models.support import how_supported

    return {
        "model_type": found.model_type,
        "supported": True,
        "adapter": found.adapter.name,
        "how": how_supported(found.model_type),
        "decoder_layers": found.layers,
        "layers": found.depth,
        "full_attention_layers": list(found.full),
        "attention_implementations": list(found.attention),
        "padding": found.adapter.padding,
        "cannot": list(found.cannot),
    }


def _show(found: Diagnosis, distance: float) -> None:
    import transformers

    from evengaze import compat
    from evengaze.models.support import how_supported

    rows = [("model type", found.model_type)]
    known = {
        "checked": "a tiny model of this type, pruned, agrees with a masked one",
        "generic": "not tried before: pruning is checked at the first prompt, geometry is inferred",
    }
    rows.append(("adapter", f"{found.adapter.name} ({known[how_supported(found.model_type)]})"))
    rows.append(("decoder layers", f"{found.layers} ({found.depth})"))
    if not found.full:
        rows.append(("rank at", "no layer attends to the whole sequence: rankings see a sliding window only"))
    elif len(found.full) < found.depth:
        after = ", ".join(str(i + 1) for i in found.full if i + 1 < found.depth)
        rows.append(("rank at", f"layers {', '.join(map(str, found.full))} attend to everything: use layer={after}"))
    kept = ", ".join(found.attention) or "none: the model's attention does not go through transformers' interface"
    rows.append(("attention", kept))
    rows.append(("padding", found.adapter.padding))
    for k, limit in enumerate(found.cannot):
        rows.append(("" if k else "does not work", limit))
    rows.append(("transformers", f"{transformers.__version__}: {compat.untested() or 'tested'}"))
    rows.append(("self-check", f"passed: a pruned tiny decoder equals a masked one within {distance:.0e}"))
    terminal.echo(tables.pairs(rows))
