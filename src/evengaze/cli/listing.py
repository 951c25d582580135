"""`evengaze list methods|models|presets`: names, and what parameters mean."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import tables, terminal
from evengaze.cli.options import AsJson

if TYPE_CHECKING:
    from evengaze.methods import Pruner


def register(app: typer.Typer, listing: typer.Typer) -> None:
    """Add the commands to the `list` group."""
    listing.command("methods")(methods)
    listing.command("models")(models)
    listing.command("presets")(presets)


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this one, with all that its parameters mean.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pruning methods with their parameters, what these mean, and their defaults."""
    from evengaze.methods import find, get, names

    if name is not None:
        _one(find(name), name, as_json)
        return
    classes = [get(one) for one in names()]
    if as_json:
        terminal.echo(terminal.as_json([_as_dict(cls) for cls in classes], default=list))
        return
    from evengaze.methods.explain import about, parameters, shared

    rows = [(cls.name, f"{about(cls)} {_defaults(cls)}".strip()) for cls in classes]
    terminal.echo(tables.pairs(rows))
    common = [(one.name, _meaning(one)) for one in parameters(classes[0]) if one.name in shared()]
    terminal.echo("\nAll methods have these, too:")
    terminal.echo(tables.pairs(common))
    terminal.echo(
        "\n" + "\n".join(tables.lines(["`evengaze list methods NAME` says what the parameters of one mean."]))
    )


def _one(cls: type[Pruner], called: str, as_json: bool) -> None:
    from evengaze.methods.explain import about, parameters

    if as_json:
        terminal.echo(terminal.as_json(_as_dict(cls), default=list))
        return
    terminal.echo("\n".join(tables.lines([f"{cls.name}: {about(cls) or 'its author has not described it'}", ""])))
    terminal.echo(tables.pairs([(one.name, _meaning(one)) for one in parameters(cls)]))
    example = next((one for one in parameters(cls) if one.default is not None and one.name == "keep"), None)
    said = "" if example is None else f":keep={json.dumps(example.default, separators=(',', ':'))}"
    terminal.echo(f"\nFor example --method {called}{said}; defined in {cls.__module__}")


def _as_dict(cls: type[Pruner]) -> dict[str, Any]:
    from evengaze.methods.explain import about, parameters, shared

    own = [one for one in parameters(cls) if one.name not in ("debias", "mode")]
    return {
        "name": cls.name,
        "about": about(cls),
        "parameters": {one.name: one.default for one in own},
        "explained": {one.name: one.about for one in parameters(cls)},
        "shared": sorted(shared()),
    }


def _meaning(one: Any) -> str:
    default = "must be given" if one.needed else f"default {json.dumps(one.default, default=str)}"
    if one.default is None and not one.needed:
        default = "none unless given"
    return f"{one.about.rstrip('.')} ({default})" if one.about else default


def _defaults(cls: type[Pruner]) -> str:
    from evengaze.methods.explain import parameters, shared

    own = [one for one in parameters(cls) if one.name not in shared()]
    text = ", ".join(tables.together(f"{one.name}={_short(one.default)}") for one in own)
    return f"[{text}]" if text else ""


def _short(default: Any) -> str:
    return "none" if default is None else json.dumps(default, separators=(",", ":"))


def models(as_json: AsJson = False) -> None:
    """Model families, by `config.model_type`."""
    from evengaze.models import BUILT_IN, adapter_for_type

    rows = []
    for kind in sorted(BUILT_IN):
        adapter = adapter_for_type(kind)
        about = (type(adapter).__doc__ or "").strip().partition("\n")[0]
        rows.append({"model_type": kind, "name": getattr(adapter, "name", kind), "about": about})
    if as_json:
        terminal.echo(terminal.as_json(rows))
        return
    columns = [tables.name("model type"), tables.name("family"), tables.text("about")]
    terminal.echo(tables.table(columns, [[row["model_type"], row["name"], row["about"]] for row in rows]))


def presets(as_json: AsJson = False) -> None:
    """Debias curves that the paper's authors published, by name."""
    from evengaze.debias import preset, preset_names

    found = [preset(name) for name in preset_names()]
    if as_json:
        rows = [
            {"name": one.name, "trend": one.trend.to_dict(), "calibrated_on": one.origin.data, "mean": one.mean}
            for one in found
        ]
        terminal.echo(terminal.as_json(rows))
        return
    files, means = [one for one in found if not one.mean], [one for one in found if one.mean]
    title = (
        f"{len(files)} curves published with arXiv 2508.17807 for LLaVA-1.5-7B, and {len(means)} means over a method's "
        "benchmarks, for pictures of none of them. Use: --debias NAME"
    )
    columns = [tables.name("preset"), tables.text("trend"), tables.text("layer"), tables.text("fitted on")]
    rows_ = [
        [one.name, one.trend.family, str(one.origin.layer), "mean of ten benchmarks" if one.mean else _fitted(one.name)]
        for one in found
    ]
    terminal.echo(tables.table(columns, rows_, title=title))


def _fitted(name: str) -> str:
    return name.split("/")[2] if name.count("/") == 2 else "all benchmarks"
