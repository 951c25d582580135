"""`evengaze curves list|show|compare|validate`."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import output, tables, terminal
from evengaze.cli.options import AsJson, BatchSize, Images, Limit, Prompts, loads_model
from evengaze.errors import CurveError, DataError

if TYPE_CHECKING:
    from evengaze.calibration.observe import Observations
    from evengaze.debias.curve import Curve
    from evengaze.evaluate.spec import ModelSpec

Name = Annotated[str, typer.Argument(help="Curve file (.json) or preset.")]


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(no_args_is_help=True)
    group.command("list")(list_curves)
    group.command("show")(show)
    group.command("compare")(compare)
    group.command("validate")(validate)
    app.add_typer(group, name="curves", help="List, show, compare and validate debias curves.")


def list_curves(
    folder: Annotated[Path | None, typer.Argument(help="List the curve files in here, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the published presets, and the curve files of a folder."""
    from evengaze.debias.curve import Curve
    from evengaze.debias.presets import preset, preset_names

    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    found = [(name, preset(name).origin, preset(name).trend) for name in preset_names()]
    for path in sorted(folder.glob("*.json")) if folder is not None else []:
        try:
            curve = Curve.load(path)
        except CurveError:  # other JSON files may lie in the folder
            continue
        found.append((str(path), curve.origin, curve.trend))
    rows = [[name, origin.method, str(origin.layer), trend.family, _ratio(trend)] for name, origin, trend in found]
    if as_json:
        keys = ("curve", "method", "layer", "trend", "last_over_first")
        terminal.echo(terminal.as_json([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    columns = [tables.name("curve"), *map(tables.text, ("method", "layer", "trend")), tables.Column("last/first")]
    terminal.echo(tables.table(columns, rows))


def show(
    name: Name,
    plot: Annotated[Path | None, typer.Option(help="Draw it (.png, .pdf, .svg).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a curve says, what it was measured on and how sure it is."""
    from evengaze.cli import session

    session.check_output(plot, *session.FIGURES)
    curve = read(name)
    if as_json:
        found = curve.to_dict() | {"band": None if not curve.band.x else {"width": curve.band.width}}
        terminal.echo(terminal.as_json({k: v for k, v in found.items() if k not in ("samples", "images")}))
    else:
        terminal.echo(tables.pairs(_described(curve)))
    if plot is not None:
        from evengaze.viz.bias import plot_trend
        from evengaze.viz.style import save

        save(plot_trend(curve), plot)
        output.note(plot)


def _described(curve: Curve) -> list[tuple[str, str]]:
    """A curve in words: what it is, what it was measured on, how good it is."""
    origin, summary = curve.origin, dict(curve.summary)
    architecture = f"({origin.architecture})" if origin.architecture else ""
    where = f"of layer {origin.layer}" if origin.layer is not None else "of any layer"
    also = f"; trends of layers {', '.join(map(str, curve.layers))} are in the file, too" if curve.layers else ""
    lines = [
        ("trend", f"{curve.trend.family}{f', {curve.fit} fit' if curve.fit else ''}"),
        ("last/first", f"{_ratio(curve.trend)}: how much more the last place gets than the first"),
        ("ranking", f"{origin.method or 'any method'} by {_TARGET.get(origin.target, origin.target)} {where}{also}"),
        ("model", " ".join(filter(None, (origin.model, origin.revision, architecture)))),
        ("data", origin.data + (f", {origin.samples} samples" if origin.samples else "")),
    ]
    if curve.band.x:
        text = f"bounds at most a factor of {curve.band.width:.2f} apart ({100 * curve.band.level:g} %)"
        lines.append(("confidence", text))
    lines += _summary(summary)
    return [*lines, ("fingerprint", curve.fingerprint)]


_TARGET = {"attention": "the mean attention", "frequency": "how often tokens are kept by the attention"}
_MEASURED = {
    "tokens": ("tokens", "averaged, padding left out"),
    "r2": ("R\u00b2", "of the fit, to the means by place"),
    "held_out": ("held-out error", "of the trend on samples that it was not fitted to, in the log"),
    "spearman": ("Spearman", "correlation of score and raster index before debiasing"),
    "spearman_frame": ("Spearman by frame", "correlation of score and frame before debiasing"),
    "kept_bottom": ("kept in bottom half", "share of the kept tokens before debiasing"),
    "kept_index": ("place of kept", "mean index of the kept tokens before debiasing, 0 first, 1 last"),
    "kept_padding": ("padding kept", "share of the kept tokens before debiasing"),
    "padding_ratio": ("padding/content", "score of padding relative to content at the same places"),
}


def _summary(summary: dict[str, float]) -> list[tuple[str, str]]:
    """Figures of a fit in words; the paper's mu and sigma with their intervals on one line each."""
    lines = []
    for name, what in (("mu", "level"), ("sigma", "slope in the log")):
        if name in summary:
            low, high = summary.pop(f"{name}_low", None), summary.pop(f"{name}_high", None)
            interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
            lines.append((name, f"{summary.pop(name):.3g}{interval}: {what} of the paper's mu exp(sigma x)"))
    for known in ("samples", "level"):
        summary.pop(known, None)
    for key, value in summary.items():
        label, what = _MEASURED.get(key, (key.replace("_", " "), ""))
        said = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        lines.append((label, f"{said}{f': {what}' if what else ''}"))
    return lines


def compare(one: Name, other: Name, as_json: AsJson = False) -> None:
    """Say how far two curves are apart, and whether their confidence bands agree."""
    found = _compared(read(one), read(other))
    if as_json:
        terminal.echo(terminal.as_json(found))
        return
    terminal.echo(f"weights differ by at most a factor of {found['factor']:.3f}")
    for difference in found["different"]:
        terminal.echo(f"different calibration: {difference}")
    if found["common"]:
        terminal.echo(f"{found['common']} pictures in common")
    if "apart" in found:
        terminal.echo(
            "the confidence bands overlap everywhere"
            if not found["apart"]
            else f"the confidence bands are apart at {found['apart']} of {found['points']} points"
        )
    elif "inside" in found:
        text = f"the curve without a band lies inside the other's at {100 * found['inside']:.0f} % of the points"
        terminal.echo(text)


def _compared(a: Curve, b: Curve) -> dict[str, Any]:
    from evengaze.calibration.fit import relative
    from evengaze.debias.trend import max_log_ratio

    where = {"architecture": b.origin.architecture, "method": b.origin.method, "layer": b.origin.layer}
    found: dict[str, Any] = {
        "factor": math.exp(max_log_ratio(a.trend, b.trend)),
        "different": a.origin.differences(**where),  # type: ignore[arg-type]
        "common": len(set(a.images) & set(b.images)),
    }
    if a.band.x and a.band.x == b.band.x:
        bounds = zip(a.band.low, a.band.high, b.band.low, b.band.high, strict=True)
        found |= {"apart": sum(max(p, r) > min(q, s) for p, q, r, s in bounds), "points": len(a.band.x)}
    elif a.band.x or b.band.x:
        import numpy as np

        band, trend = (a.band, b.trend) if a.band.x else (b.band, a.trend)
        log = relative(trend, np.array(band.x))
        found["inside"] = float(((np.log(band.low) <= log) & (log <= np.log(band.high))).mean())
    return found


@loads_model
def validate(
    spec: ModelSpec,
    name: Name,
    images: Images = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Method and budget; default: the curve's own at keep=0.25.")
    ] = None,
    prompt: Prompts = None,
    limit: Limit = None,
    batch_size: BatchSize = 4,
    as_json: AsJson = False,
) -> None:
    """Debias held-out pictures with a curve and say whether it corrects too much or too little.

    Exit status 1 if it does, 3 if some pictures could not be read (the others are used), 4 if both.
    """
    from evengaze.calibration.measures import NAMES
    from evengaze.calibration.observe import rankable
    from evengaze.calibration.validate import validate as check
    from evengaze.cli import session
    from evengaze.debias.curve import CurveWarning
    from evengaze.evaluate.samples import Source, encode

    curve = read(name)
    ranked_by = (
        method or f"{curve.origin.method or 'fastv'}{':keep=0.25' if curve.origin.method in ('', 'fastv') else ''}"
    )
    pruner = session.method(ranked_by)
    rankable(pruner, session.depth(spec))
    source = Source.of(images, prompt or (), limit, model=spec.source, split="eval")
    output.note(f"validating on {len(source)} samples of the {source.name}; --limit N takes N of them")
    loaded = session.Session(spec)
    with (
        warnings.catch_warnings(record=True) as found,
        output.progress("validating", len(source)) as advance,
    ):
        warnings.simplefilter("always", CurveWarning)

        def after_batch(now: Observations) -> bool:
            advance(now.samples)
            return False

        verdict = check(
            curve,
            loaded.predictor.model,
            loaded.predictor.processor,
            source.samples(loaded.predictor),
            pruner,
            batch_size=batch_size,
            encode=encode,
            after_batch=after_batch,
        )
    for warning in found:
        output.warn(warning.message)
    status = output.skipped(source.skipped)
    if as_json:
        told = {when: {k: asdict(m) for k, m in getattr(verdict, when).items()} for when in ("before", "after")}
        terminal.echo(terminal.as_json({"verdict": verdict.finding, "overlap": verdict.overlap, **told}))
    else:
        for key in NAMES:
            if key in verdict.before:
                terminal.echo(
                    f"{NAMES[key]}\n    plain     {verdict.before[key]}\n    debiased  {verdict.after.get(key, '-')}"
                )
        terminal.echo(f"verdict: {verdict.finding}")
    wrong = verdict.finding.endswith("corrects")
    if wrong or status:
        raise typer.Exit(status + wrong)


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
