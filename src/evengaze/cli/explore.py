"""`evengaze explore`: a page in the browser to try methods on."""

from __future__ import annotations

from typing import Annotated

import typer

from evengaze.cli.options import Adapter, AllowMissing, Attention, Device, DType, Model, Quantize, Revision


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explore")(explore)


def explore(
    model: Model = "demo",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest upload.")] = 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of a picture.")] = 40_000_000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    attention: Attention = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    allow_missing: AllowMissing = False,
) -> None:
    """Move sliders in the browser: dense, plain and debiased answers side by side, with what each still sees."""
    from evengaze.evaluate.predictor import ModelSpec
    from evengaze.explore.start import run

    spec = ModelSpec(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        attention=attention,
        adapter=adapter,
        quantize=quantize,
        allow_missing=allow_missing,
    )
    run(
        spec,
        host=host,
        port=port,
        open_browser=open_browser,
        megabytes=max_megabytes,
        pixels=max_pixels,
        new_tokens=max_new_tokens,
    )
