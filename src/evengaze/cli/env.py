"""`evengaze env`: what to put into a report of a fault."""

from __future__ import annotations

from typing import Annotated

import typer

from evengaze.cli import terminal


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("env")(env)


def env(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show versions, devices and attention implementations, and check whether pruning works here.

    Paste its output into a report of a fault. Exit status 1 if the check fails.
    """
    import json

    from evengaze.environment import as_lines, describe

    found = describe()
    if as_json:
        terminal.echo(json.dumps(found, indent=2))
    else:
        lines = as_lines(found)
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            terminal.echo(f"{name:<{width}}  {value}")
    if not found["self_check"]["passed"]:
        raise typer.Exit(1)
