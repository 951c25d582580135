"""`evengaze profile`: what methods save on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import terminal
from evengaze.cli.options import AllowMissing, Device, DType, Model, Revision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

    from evengaze.cli.session import Session
    from evengaze.methods import Pruner


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("profile")(profile)


def profile(
    model: Model = "demo",
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "-m", help="E.g. 'fastv:keep=64;random:keep=64'; see `evengaze list methods`."),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture; a synthetic one if left out.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")] = "what is in this picture?",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; the methods take turns in each.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> None:
    """Prefill time, memory and key/value cache of methods, each relative to the dense model.

    Times are those of the whole prefill, vision tower included; all methods take turns in one process.
    """
    import json

    from evengaze.cli import session
    from evengaze.methods import split

    specs = split(methods or ["fastv:keep=0.5;fastv:keep=0.25;fastv:keep=0.125"])
    pruners = [session.method(spec) for spec in specs]
    pictures = [session.sample_picture()] if image is None else session.read_pictures([image])
    loaded = session.Session(model, revision=revision, dtype=dtype, device=device, allow_missing=allow_missing)
    rows = _measure(loaded, pictures, prompt, dict(zip(specs, pruners, strict=True)), rounds)
    if as_json:
        terminal.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table()
    table.add_column("method", overflow="fold", min_width=14)
    for head in ("average\ntokens", "FLOPs", "time", "best\ns", "CPU\ntime", "peak\nmemory", "KV\ncache"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            str(row["method"]),
            f"{row['average_tokens']:.1f}",
            *(f"{row[k]:.1%}" for k in ("flops", "time")),
            f"{row['best_seconds']:.3f}",
            *(f"{row[k]:.1%}" for k in ("cpu_time", "peak_memory", "kv_cache")),
        )
    terminal.Screen().print(table)
    terminal.secho("Shares of the dense prefill. FLOPs are the decoder's, predicted; the rest is measured.", dim=True)


def _measure(
    loaded: Session, pictures: Sequence[Image], prompt: str, pruners: Mapping[str, Pruner], rounds: int
) -> list[dict[str, Any]]:
    """One row a method, the dense model first."""
    import torch

    from evengaze.compat import cache_of
    from evengaze.methods import parse
    from evengaze.profile import cache_bytes, interleave, peak_bytes, predict

    model: Any = loaded.predictor.model
    inputs = loaded.inputs(pictures, prompt)

    def prefill(pruner: Pruner) -> Any:
        with torch.inference_mode(), pruner(model):
            return cache_of(model(**inputs, use_cache=True, logits_to_keep=1))

    every = {"dense": parse("dense"), **pruners}
    with torch.inference_mode(), every["dense"](model) as run:
        model(**inputs)
    visual = 0 if run.trace is None else len(run.trace.layout.rows[0])
    text = int(inputs["input_ids"].shape[1]) - visual
    calls = {name: partial(prefill, pruner) for name, pruner in every.items()}
    times = interleave(calls, rounds=rounds)
    peak = {name: peak_bytes(call, model.device) for name, call in calls.items()}
    cache = {name: cache_bytes(call()) for name, call in calls.items()}
    rows = []
    for name, pruner in every.items():
        saving = predict(pruner, model.config, visual, text)
        rows.append(
            {
                "method": name,
                "average_tokens": saving.average,
                "flops": saving.flops,
                "time": times[name].ratio(times["dense"]),
                "cpu_time": times[name].cpu_ratio(times["dense"]),
                "best_seconds": times[name].best,
                "peak_memory": peak[name] / peak["dense"],
                "peak_bytes": peak[name],
                "kv_cache": cache[name] / cache["dense"],
                "kv_bytes": cache[name],
            }
        )
    return rows
