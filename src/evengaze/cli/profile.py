"""`evengaze profile`: what methods save on this machine."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import output, tables, terminal
from evengaze.cli.options import (
    Adapter,
    AllowMissing,
    AsJson,
    Attention,
    Device,
    DType,
    Model,
    Quantize,
    Revision,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

    from evengaze.cli.session import Session
    from evengaze.methods import Pruner

_CLEAR = 0.02
"""Methods whose FLOPs differ by less than this share of the dense model's are not compared."""


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
    as_json: AsJson = False,
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    attention: Attention = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    allow_missing: AllowMissing = False,
) -> None:
    """Prefill time, memory and key/value cache of methods, each relative to the dense model.

    Times are those of the whole prefill, vision tower included; all methods take turns in one process. For what
    methods will cost on a model that is not here, see `evengaze plan`.
    """
    from evengaze.cli import session
    from evengaze.methods import split

    specs = split(methods or ["fastv:keep=0.5;fastv:keep=0.25;fastv:keep=0.125"])
    pruners = [session.method(spec) for spec in specs]
    pictures = [session.sample_picture()] if image is None else session.read_pictures([image])
    session.check_stages(pruners, model, revision)
    loaded = session.Session(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        attention=attention,
        adapter=adapter,
        quantize=quantize,
        allow_missing=allow_missing,
    )
    rows = _measure(loaded, pictures, prompt, dict(zip(specs, pruners, strict=True)), rounds)
    if as_json:
        terminal.echo(terminal.as_json(rows))
    else:
        terminal.echo(_table(rows))
        output.note(
            "Shares of the dense prefill. FLOPs are the decoder's, predicted; the rest is measured. Time: the median "
            f"of {rounds} rounds; in brackets its interval."
        )
    for text in contradictions(rows):
        output.warn(text)


def contradictions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where times are in another order than FLOPs, or so uncertain that they say nothing, in words."""
    found = []
    for one, other in itertools.combinations(rows, 2):
        less, more = (one, other) if one["flops"] < other["flops"] else (other, one)
        if more["flops"] - less["flops"] > _CLEAR and less["time"] > more["time"]:
            sure = less["time_low"] > more["time_high"]
            why = (
                "their intervals do not overlap: the method's own work, or launching kernels, costs more than it saves "
                "on prompts as short as this"
                if sure
                else "their intervals overlap, so this is noise: give more --rounds, or leave the machine to it"
            )
            found.append(
                f"{less['method']} has fewer FLOPs than {more['method']} ({less['flops']:.0%} to {more['flops']:.0%}) "
                f"but took longer ({less['time']:.0%} to {more['time']:.0%}); {why}"
            )
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("average tokens", "FLOPs", "time", "", "best s", "CPU time", "peak memory", "KV cache")
    return tables.table(
        [tables.name("method"), *map(tables.Column, heads)],
        [
            [
                str(row["method"]),
                f"{row['average_tokens']:.1f}",
                f"{row['flops']:.0%}",
                f"{row['time']:.0%}",
                "" if row["time_low"] == row["time_high"] else f"[{row['time_low']:.0%}, {row['time_high']:.0%}]",
                f"{row['best_seconds']:.3f}",
                *(f"{row[key]:.0%}" for key in ("cpu_time", "peak_memory", "kv_cache")),
            ]
            for row in rows
        ],
    )


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
        low, high = times[name].interval(times["dense"])
        rows.append(
            {
                "method": name,
                "average_tokens": saving.average,
                "flops": saving.flops,
                "time": times[name].ratio(times["dense"]),
                "time_low": low,
                "time_high": high,
                "cpu_time": times[name].cpu_ratio(times["dense"]),
                "best_seconds": times[name].best,
                "peak_memory": peak[name] / peak["dense"],
                "peak_bytes": peak[name],
                "kv_cache": cache[name] / cache["dense"],
                "kv_bytes": cache[name],
            }
        )
    return rows
