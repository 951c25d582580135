"""`evengaze curves list|show|compare|validate`."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from evengaze.cli import terminal
from evengaze.cli.options import AllowMissing, BatchSize, Device, DType, Images, Limit, Model, Prompts, Revision
from evengaze.errors import CurveError, DataError

if TYPE_CHECKING:
    from evengaze.debias.curve import Curve

Name = Annotated[str, typer.Argument(help="Curve file (.json) or preset.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the group."""
    app.command("list")(list_curves)
    app.command("show")(show)
    app.command("compare")(compare)
    app.command("validate")(validate)


def list_curves(
    folder: Annotated[Path | None, typer.Argument(help="List the curve files in here, too.")] = None,
) -> None:
    """List the published presets, and the curve files of a folder."""
    from evengaze.debias.curve import Curve
    from evengaze.debias.presets import preset, preset_names

    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    table = RichTable("curve", "method", "layer", "trend", "last/first", box=None)
    for name in preset_names():
        one = preset(name)
        table.add_row(name, one.origin.method, str(one.origin.layer), one.trend.family, _ratio(one.trend))
    for path in sorted(folder.glob("*.json")) if folder is not None else []:
        try:
            curve = Curve.load(path)
        except CurveError:  # other JSON files may lie in the folder
            continue
        table.add_row(str(path), curve.origin.method, str(curve.origin.layer), curve.trend.family, _ratio(curve.trend))
    terminal.Screen(width=120).print(table)


def show(
    name: Name,
    plot: Annotated[Path | None, typer.Option(help="Draw it (.png, .pdf, .svg).")] = None,
) -> None:
    """Show what a curve says, what it was measured on and how sure it is."""
    from evengaze.cli import session

    session.output(plot, ".png", ".pdf", ".svg")
    curve = read(name)
    origin = curve.origin
    lines = {
        "model": " ".join(filter(None, (origin.model, origin.revision, f"({origin.architecture})"))),
        "method": f"{origin.method}, {origin.target}, layer {origin.layer}"
        + (f" (also layers {', '.join(map(str, curve.layers))})" if curve.layers else ""),
        "data": f"{origin.data}, {origin.samples} samples" if origin.samples else origin.data,
        "trend": f"{curve.trend.family}{f', {curve.fit} fit' if curve.fit else ''}, last/first {_ratio(curve.trend)}",
    }
    lines |= {k: f"{v:.4g}" for k, v in curve.summary.items()}
    if curve.band.x:
        lines["band"] = f"bounds at most a factor of {curve.band.width:.2f} apart ({100 * curve.band.level:g} %)"
    lines["fingerprint"] = curve.fingerprint
    width = max(map(len, lines))
    for key, value in lines.items():
        terminal.echo(f"{key:<{width}}  {value}")
    if plot is not None:
        from evengaze.viz.bias import plot_trend

        plot_trend(curve).savefig(plot)


def compare(one: Name, other: Name) -> None:
    """Say how far two curves are apart, and whether their confidence bands agree."""
    from evengaze.calibration.fit import relative
    from evengaze.debias.trend import max_log_ratio

    a, b = read(one), read(other)
    terminal.echo(f"weights differ by at most a factor of {math.exp(max_log_ratio(a.trend, b.trend)):.3f}")
    for difference in a.origin.differences(
        architecture=b.origin.architecture, method=b.origin.method, layer=b.origin.layer
    ):
        terminal.echo(f"different calibration: {difference}")
    common = set(a.images) & set(b.images)
    if common:
        terminal.echo(f"{len(common)} pictures in common")
    if a.band.x and a.band.x == b.band.x:
        apart = sum(
            max(p, r) > min(q, s) for p, q, r, s in zip(a.band.low, a.band.high, b.band.low, b.band.high, strict=True)
        )
        terminal.echo(
            "the confidence bands overlap everywhere"
            if not apart
            else f"the confidence bands are apart at {apart} of {len(a.band.x)} points"
        )
    elif a.band.x or b.band.x:
        import numpy as np

        band, trend = (a.band, b.trend) if a.band.x else (b.band, a.trend)
        x = np.array(band.x)
        log = relative(trend, x)
        inside = ((np.log(band.low) <= log) & (log <= np.log(band.high))).mean()
        terminal.echo(f"the curve without a band lies inside the other's at {100 * inside:.0f} % of the points")


def validate(
    name: Name,
    model: Model = "demo",
    images: Images = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Method and budget; default: the curve's own at keep=0.25.")
    ] = None,
    prompt: Prompts = None,
    limit: Limit = None,
    batch_size: BatchSize = 4,
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> None:
    """Debias held-out pictures with a curve and say whether it corrects too much or too little.

    Exit status 1 if it does.
    """
    from evengaze.calibration.measures import NAMES
    from evengaze.calibration.validate import validate as check
    from evengaze.cli import session
    from evengaze.cli.samples import Source, encode
    from evengaze.debias.curve import CurveWarning

    curve = read(name)
    spec = method or f"{curve.origin.method or 'fastv'}{':keep=0.25' if curve.origin.method in ('', 'fastv') else ''}"
    source = Source.of(images, prompt or (), limit, model=model, split="eval")
    loaded = session.Session(model, revision=revision, dtype=dtype, device=device, allow_missing=allow_missing)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", CurveWarning)
        verdict = check(
            curve,
            loaded.predictor.model,
            loaded.predictor.processor,
            source.samples(loaded.predictor),
            session.method(spec),
            batch_size=batch_size,
            encode=encode,
        )
    for warning in found:
        terminal.secho(f"Warning: {warning.message}", fg=typer.colors.YELLOW, err=True)
    for key in NAMES:
        if key in verdict.before:
            terminal.echo(
                f"{NAMES[key]}\n    plain     {verdict.before[key]}\n    debiased  {verdict.after.get(key, '-')}"
            )
    terminal.echo(f"verdict: {verdict.finding}")
    if verdict.finding.endswith("corrects"):
        raise typer.Exit(1)


def read(name: str) -> Curve:
    """A curve file, or a preset as a curve."""
    from evengaze.debias.curve import Curve
    from evengaze.debias.presets import preset

    if name.endswith(".json"):
        return Curve.load(name)
    found = preset(name)
    return Curve(found.trend, found.origin)


def _ratio(trend: object) -> str:
    """f(1) / f(0)."""
    import torch

    from evengaze.debias.trend import TrendCurve

    assert isinstance(trend, TrendCurve)
    return f"{1 / float(trend.weight(torch.ones(1))):.2f}"
