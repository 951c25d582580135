"""`evengaze calibrate`: the curve that removes a model's bias."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from evengaze.cli import output, terminal
from evengaze.cli.options import AsJson, BatchSize, Formats, Images, Limit, Method, Prompts, loads_model
from evengaze.cli.output import INTERRUPTED
from evengaze.errors import ConfigError, CurveError

if TYPE_CHECKING:
    from evengaze.calibration.fit import Family, Fit
    from evengaze.calibration.observe import Observations
    from evengaze.evaluate.spec import ModelSpec

SAVE_EVERY = 15.0
"""Seconds between two writes of the state."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("calibrate")(calibrate)


@loads_model
def calibrate(
    spec: ModelSpec,
    out: Annotated[Path, typer.Option("--out", "-o", help="The curve file (.json).")],
    images: Images = None,
    method: Method = "fastv:keep=0.25,layer=2",
    layers: Annotated[
        str | None,
        typer.Option(help="0-based layers whose attention is ranked by: all, or 1,2,3; default: the method's."),
    ] = None,
    target: Annotated[str, typer.Option(help="attention (mean score) or frequency (how often kept).")] = "attention",
    family: Annotated[
        str,
        typer.Option(
            help="auto, exponential (the paper's), exponential-floor, polynomial, reciprocal-polynomial, isotonic or "
            "rows-columns."
        ),
    ] = "auto",
    fit: Annotated[str | None, typer.Option(help="geometric (default), log, or least-squares (the paper's).")] = None,
    prompt: Prompts = None,
    tolerance: Annotated[
        float | None, typer.Option(min=1e-6, help="Stop when the confidence band is within this fraction, e.g. 0.1.")
    ] = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds take other pictures of the embedded set.")] = 0,
    batch_size: BatchSize = 4,
    figures: Annotated[Path | None, typer.Option(help="Write figures into this folder.")] = None,
    formats: Formats = "png",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from an interrupted calibration.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how a method's scores depend on position, and write the curve that removes it.

    An interrupted calibration goes on where it stopped when the command is given again. Exit status 3 if some pictures
    could not be read; the others are used.
    """
    from evengaze.calibration.calibrate import calibrate as measure
    from evengaze.calibration.observe import rankable
    from evengaze.cli import session
    from evengaze.debias.curve import Origin
    from evengaze.evaluate.samples import Source, encode

    session.check_output(out, ".json")
    _check(target, family, fit)
    drawn = session.formats(formats)
    if figures is not None:
        session.check_folder(figures)
    pruner, chosen = session.method(method), session.layers_of(layers)
    rankable(pruner, session.depth(spec), chosen)
    source = Source.of(images, prompt or (), limit, model=spec.source, split="calibration", seed=seed)
    loaded = session.Session(spec)
    predictor = loaded.predictor
    with _resumable(out.with_suffix(".state.json"), len(source), fresh) as (state, after_batch):
        seen = [] if state is None else [state]

        def watch(now: Observations) -> bool:
            seen[:] = [now]
            return after_batch(now)

        try:
            curve = measure(
                predictor.model,
                predictor.processor,
                source.samples(predictor),
                pruner,
                layers=chosen,
                target=cast("Literal['attention', 'frequency']", target),
                family=cast("Family", family),
                fit=cast("Fit | None", fit),
                tolerance=tolerance,
                batch_size=batch_size,
                encode=encode,
                state=state,
                after_batch=watch,
                origin=Origin(model=predictor.spec.name, revision=predictor.revision, data=source.name),
            )
        except CurveError:
            output.skipped(source.skipped)  # it may be why
            raise
    curve.save(out)
    output.note(_sentence(curve.summary, curve.origin.samples, curve.origin.layer))
    if figures is not None:
        from evengaze.viz.bias import plot_heat_maps, plot_trend
        from evengaze.viz.style import save

        save(plot_trend(curve), figures / "trend.png", drawn)
        save(plot_heat_maps({k: s.heat_map() for k, s in seen[0].layers.items()}), figures / "heat_map.png", drawn)
    if as_json:
        found = {"curve": str(out), "fingerprint": curve.fingerprint, "trend": curve.trend.to_dict(), "fit": curve.fit}
        terminal.echo(terminal.as_json(found | {"summary": curve.summary, "skipped": source.skipped}))
    else:
        terminal.echo(f"{out}: {curve.trend.family} ({curve.fit}), {curve.fingerprint}")
    if status := output.skipped(source.skipped):
        raise typer.Exit(status)


def _sigma(summary: Mapping[str, float]) -> str:
    if "sigma_low" not in summary:
        return f"{summary['sigma']:.2f}"
    return f"{summary['sigma']:.2f} [{summary['sigma_low']:.2f}, {summary['sigma_high']:.2f}]"


def _sentence(summary: Mapping[str, float], samples: int, layer: int | None) -> str:
    text = f"layer {layer}, {samples} samples: mu {summary['mu']:.3g}, sigma {_sigma(summary)}"
    if "held_out" in summary:
        text += f", R2 {summary['r2']:.2f}, held-out error {summary['held_out']:.2f}"
    return text


def _check(target: str, family: str, fit: str | None) -> None:
    from typing import get_args

    from evengaze.calibration.fit import Family, Fit
    from evengaze.spelling import did_you_mean

    for name, value, known in (
        ("--target", target, ("attention", "frequency")),
        ("--family", family, (*get_args(Family), "rows-columns")),
        ("--fit", fit or "log", get_args(Fit)),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value}: give one of {', '.join(known)}.{did_you_mean(value, known)}")


@contextmanager
def _resumable(
    path: Path, total: int, fresh: bool
) -> Iterator[tuple[Observations | None, Callable[[Observations], bool]]]:
    """A state file that outlives a kill, and progress. The file is removed once the observation is whole."""
    from evengaze.calibration.observe import Observations

    state = Observations.load(path) if path.exists() and not fresh else None
    if state is not None:
        output.note(f"going on after {state.samples} samples ({path})")
    written = time.monotonic()
    latest = state

    with output.progress("observing", total, 0 if state is None else state.samples) as advance:

        def after_batch(now: Observations) -> bool:
            nonlocal written, latest
            advance(now.samples)
            latest = now
            if time.monotonic() - written > SAVE_EVERY:
                now.save(path)
                written = time.monotonic()
            return False

        try:
            yield state, after_batch
        except KeyboardInterrupt:
            if latest is not None:
                latest.save(path)
            output.note(f"\nstopped; the same command goes on from {path}" if path.exists() else "\nstopped")
            raise typer.Exit(INTERRUPTED) from None
    path.unlink(missing_ok=True)
