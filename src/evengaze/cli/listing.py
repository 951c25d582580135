"""`evengaze list methods|models|presets`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from evengaze.cli import terminal

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(app: typer.Typer, listing: typer.Typer) -> None:
    """Add the commands to the `list` group."""
    listing.command("methods")(methods)
    listing.command("models")(models)
    listing.command("presets")(presets)


def methods(as_json: AsJson = False) -> None:
    """Pruning methods with their parameters and defaults."""
    from dataclasses import MISSING, fields

    from evengaze.methods import get, names

    rows = []
    for name in names():
        cls = get(name)
        parameters = {
            f.name: None if f.default is MISSING else f.default for f in fields(cls) if f.name not in ("debias", "mode")
        }
        rows.append({"name": name, "about": _first_line(cls), "parameters": parameters})
    _show(
        rows,
        as_json,
        ("method", "what it does", "parameters"),
        lambda r: (r["name"], r["about"], _defaults(r["parameters"])),
    )


def models(as_json: AsJson = False) -> None:
    """Model families, by `config.model_type`."""
    from evengaze.models import BUILT_IN, adapter_for_type

    rows = []
    for kind in sorted(BUILT_IN):
        adapter = adapter_for_type(kind)
        rows.append({"model_type": kind, "name": getattr(adapter, "name", kind), "about": _first_line(type(adapter))})
    _show(rows, as_json, ("model type", "family", "about"), lambda r: (r["model_type"], r["name"], r["about"]))


def presets(as_json: AsJson = False) -> None:
    """Published debias curves, by name."""
    from evengaze.debias import preset, preset_names

    rows = []
    for name in preset_names():
        found = preset(name)
        rows.append({"name": name, "trend": found.trend.to_dict(), "calibrated_on": found.origin.data})
    _show(
        rows,
        as_json,
        ("preset", "trend", "calibrated on"),
        lambda r: (r["name"], r["trend"]["family"], r["calibrated_on"]),
    )


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _defaults(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{k}={json.dumps(v)}" for k, v in parameters.items())


def _show(rows: list[dict[str, Any]], as_json: bool, heads: tuple[str, ...], line: Any) -> None:
    if as_json:
        terminal.echo(json.dumps(rows, indent=2, default=list))
        return
    from rich.table import Table

    table = Table(*heads)
    for row in rows:
        table.add_row(*line(row))
    terminal.Screen().print(table)
