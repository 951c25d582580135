"""`evengaze explore`: a page in the browser to try methods on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evengaze.cli.options import loads_model

if TYPE_CHECKING:
    from evengaze.evaluate.spec import ModelSpec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explore")(explore)


@loads_model
def explore(
    spec: ModelSpec,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest upload.")] = 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of a picture.")] = 40_000_000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
) -> None:
    """Move sliders in the browser: dense, plain and debiased answers side by side, with what each still sees."""
    from evengaze.explore.start import run

    run(
        spec,
        host=host,
        port=port,
        open_browser=open_browser,
        megabytes=max_megabytes,
        pixels=max_pixels,
        new_tokens=max_new_tokens,
    )
