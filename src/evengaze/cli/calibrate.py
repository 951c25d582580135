"""`evengaze calibrate`, `evengaze bias` and `evengaze curves`."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from evengaze.cli import terminal
from evengaze.cli.options import AllowMissing, BatchSize, Device, DType, Images, Limit, Model, Prompts, Revision
from evengaze.errors import ConfigError, CurveError

if TYPE_CHECKING:
    from evengaze.calibration.fit import Family, Fit
    from evengaze.calibration.measures import Measure
    from evengaze.calibration.observe import Observations
    from evengaze.debias.debias import Debias

INTERRUPTED = 130
SAVE_EVERY = 15.0
"""Seconds between two writes of the state."""

Method = Annotated[
    str, typer.Option("--method", "-m", help="Whose ranking, as in `evengaze list methods`; the budget only measures.")
]

console = terminal.Screen(stderr=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    from evengaze.cli import curves

    app.command("calibrate")(calibrate)
    app.command("bias")(bias)
    group = typer.Typer(no_args_is_help=True)
    curves.register(group)
    app.add_typer(group, name="curves", help="List, show, compare and validate debias curves.")


def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The curve file (.json).")],
    model: Model = "demo",
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
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from an interrupted calibration.")] = False,
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> None:
    """Measure how a method's scores depend on position, and write the curve that removes it.

    An interrupted calibration goes on where it stopped when the command is given again.
    """
    from evengaze.calibration.calibrate import tight as is_tight
    from evengaze.calibration.calibrate import to_curve
    from evengaze.calibration.observe import observe
    from evengaze.calibration.observer import first_layer
    from evengaze.cli import session
    from evengaze.cli.samples import Source, encode
    from evengaze.debias.curve import Origin

    session.output(out, ".json")
    _check(target, family, fit)
    pruner = session.method(method)
    source = Source.of(images, prompt or (), limit, model=model, split="calibration", seed=seed)
    loaded = session.Session(model, revision=revision, dtype=dtype, device=device, allow_missing=allow_missing)
    predictor = loaded.predictor
    own = first_layer(pruner, loaded.layers)
    options: dict[str, Any] = {"family": cast("Family", family), "fit": cast("Fit | None", fit)}

    def enough(now: Observations) -> bool:
        return tolerance is not None and is_tight(now, tolerance, batch_size, **options)

    with _resumable(out.with_suffix(".state.json"), len(source), fresh) as (state, after_batch):
        stopped = state is not None and enough(state)
        found = (
            state
            if stopped and state is not None
            else observe(
                predictor.model,
                predictor.processor,
                source.samples(predictor),
                pruner,
                layers=_layers(layers),
                target=cast("Literal['attention', 'frequency']", target),
                batch_size=batch_size,
                encode=encode,
                state=state,
                after_batch=lambda now: bool(after_batch(now)) or enough(now),
            )
        )
    origin = Origin(model=predictor.spec.name, revision=predictor.revision, data=source.name)
    curve = to_curve(found, own, origin=origin, **options)
    curve.save(out)
    console.print(_sentence(curve.summary, found.samples, curve.origin.layer))
    if figures is not None:
        from evengaze.viz.bias import plot_heat_maps, plot_trend

        figures.mkdir(parents=True, exist_ok=True)
        plot_trend(curve).savefig(figures / "trend.png")
        plot_heat_maps({k: s.heat_map() for k, s in found.layers.items()}).savefig(figures / "heat_map.png")
    terminal.echo(f"{out}: {curve.trend.family} ({curve.fit}), {curve.fingerprint}")


def bias(
    model: Model = "demo",
    images: Images = None,
    method: Method = "fastv:keep=0.25,layer=2",
    layers: Annotated[str, typer.Option(help="0-based layers whose attention is ranked by: all, or 1,2,3.")] = "all",
    debias: Annotated[
        str | None, typer.Option(help="Measure with this, too: padding, a preset's name, or curve.json.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the figures and bias.json.")] = Path("bias"),
    prompt: Prompts = None,
    limit: Limit = None,
    batch_size: BatchSize = 4,
    revision: Revision = None,
    dtype: DType = "auto",
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> None:
    """Show at which layers a model's attention is biased by position and padding, and how strongly.

    With --debias every measure is shown before and after. With a curve file that holds several layers, each layer is
    debiased by its own trend.
    """
    from evengaze.calibration.calibrate import to_curve
    from evengaze.calibration.fit import fit_curve
    from evengaze.calibration.measures import sigma
    from evengaze.calibration.observe import observe
    from evengaze.cli import session
    from evengaze.cli.samples import Source, encode
    from evengaze.viz.bias import plot_heat_maps, plot_layers, plot_trend

    out.mkdir(parents=True, exist_ok=True)
    pruner, chosen = session.method(method), _layers(layers)
    steps = None if debias is None else _by_layer(debias)
    source = Source.of(images, prompt or (), limit, model=model, split="eval" if debias else "calibration")
    loaded = session.Session(model, revision=revision, dtype=dtype, device=device, allow_missing=allow_missing)
    predictor = loaded.predictor
    with _progress(len(source)) as advance:

        def after_batch(now: Observations) -> bool:
            advance(now.samples)
            return False

        found = observe(
            predictor.model,
            predictor.processor,
            source.samples(predictor),
            pruner,
            layers=chosen,
            debias=steps,
            batch_size=batch_size,
            encode=encode,
            after_batch=after_batch,
        )
    if not found.layers:
        raise CurveError("no sample with visual tokens was seen; were there pictures at all?")
    _warn_of_misuse(steps, found, pruner.name)
    before: dict[int, dict[str, Measure]] = {}
    after: dict[int, dict[str, Measure]] = {}
    rows: dict[str, Any] = {}
    for layer, stats in found.layers.items():
        curve = to_curve(found, layer, family="exponential", fit="log", beside=False)
        plot_trend(curve).savefig(out / f"trend_{layer:02d}.png")
        before[layer] = {"sigma": sigma(curve.summary), **found.measures(layer)}
        rows[str(layer)] = {"before": _plain(before[layer])}
        if stats.debiased is not None:
            line = fit_curve(stats.debiased.profile(), family="exponential", fit="log", bootstraps=2)
            after[layer] = {"sigma": sigma(line.summary), **found.measures(layer, after=True)}
            rows[str(layer)]["after"] = _plain(after[layer])
        frames = stats.by_frame()
        if len(frames) > 1:
            rows[str(layer)]["frames"] = (frames / frames.mean()).tolist()
    plot_heat_maps({k: s.heat_map() for k, s in found.layers.items()}).savefig(out / "heat_maps.png")
    plot_layers(before, after).savefig(out / "layers.png")
    text = json.dumps({"method": found.method, "samples": found.samples, "layers": rows}, indent=1)
    (out / "bias.json").write_text(text + "\n", encoding="utf-8")
    title = f"{pruner.name} on {predictor.spec.name}: {found.samples} samples of the {source.name}"
    terminal.Screen(width=170).print(_table(title, before, after))
    for name, row in rows.items():
        if "frames" in row:
            terminal.echo(f"layer {name}, mean score by frame: {' '.join(f'{v:.2f}' for v in row['frames'])}")
    terminal.echo(
        f"{out}/: heat_maps.png, layers.png, trend_NN.png, bias.json. In brackets: intervals, and what no bias would "
        "give; starred: the interval excludes that."
    )


def _by_layer(text: str) -> Debias | dict[int, Debias]:
    """What `Debias.parse` takes; a curve file's trends by layer, if it has several."""
    from evengaze.debias.curve import Curve
    from evengaze.debias.debias import Debias

    if not text.endswith(".json"):
        return Debias.parse(text)
    curve = Curve.load(text)
    if not curve.layers or curve.origin.layer is None:
        return Debias.of(curve)
    return {layer: Debias.of(curve, layer=layer) for layer in (curve.origin.layer, *curve.layers)}


def _warn_of_misuse(steps: Debias | dict[int, Debias] | None, found: Observations, method: str) -> None:
    from evengaze.debias.curve import CurveWarning

    one = next(iter(steps.values()), None) if isinstance(steps, dict) else steps
    if one is not None:
        one.check(architecture=found.architecture, method=method)
        own = None if one.origin is None else one.origin.layer
        others = [str(k) for k in found.layers if k != own]
        if own is not None and others and not isinstance(steps, dict):
            text = f"the curve is of layer {own} and used at layers {', '.join(others)}; calibrate with --layers all"
            warnings.warn(text, CurveWarning, stacklevel=3)
    known = frozenset(() if one is None or one.curve is None else one.curve.images)
    seen = sum(digest in known for digest in found.digests)
    if seen:
        text = f"the curve was calibrated on the pictures of {seen} of these {found.samples} samples; give other ones"
        warnings.warn(text, CurveWarning, stacklevel=3)


_TITLES = {
    "sigma": "sigma (0)",
    "spearman": "Spearman (0)",
    "spearman_frame": "Spearman, frames (0)",
    "kept_bottom": "kept in bottom half",
    "kept_index": "mean kept index",
    "kept_padding": "padding among kept",
    "padding_ratio": "padding/content (1)",
}


def _table(title: str, before: Mapping[int, Mapping[str, Measure]], after: Mapping[int, Any]) -> RichTable:
    table = RichTable(title=title, box=None)
    names = [n for n in _TITLES if any(n in m for m in before.values())]
    for column in ("layer", *(["ranking"] if after else []), *(_TITLES[n] for n in names)):
        table.add_column(column, justify="left" if column == "ranking" else "right")
    for layer, plain in before.items():
        table.add_row(str(layer), *(["plain"] if after else []), *_cells(plain, names))
        if layer in after:
            table.add_row("", "debiased", *_cells(after[layer], names))
    return table


def _cells(measures: Mapping[str, Measure], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        m = measures.get(name)
        even = "" if m is None or "(" in _TITLES[name] else f" ({m.even:.2f})"
        cells.append("" if m is None else f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}]{even}{'*' if m.biased else ''}")
    return cells


def _sigma(summary: Mapping[str, float]) -> str:
    if "sigma_low" not in summary:
        return f"{summary['sigma']:.2f}"
    return f"{summary['sigma']:.2f} [{summary['sigma_low']:.2f}, {summary['sigma_high']:.2f}]"


def _sentence(summary: Mapping[str, float], samples: int, layer: int | None) -> str:
    text = f"layer {layer}, {samples} samples: mu {summary['mu']:.3g}, sigma {_sigma(summary)}"
    if "held_out" in summary:
        text += f", R2 {summary['r2']:.2f}, held-out error {summary['held_out']:.2f}"
    return text


def _plain(measures: Mapping[str, Measure]) -> dict[str, dict[str, float | None]]:
    """JSON has no NaN."""
    return {
        k: {n: None if (v := float(getattr(m, n))) != v else v for n in ("value", "low", "high", "even")}
        for k, m in measures.items()
    }


def _layers(text: str | None) -> list[int] | Literal["all"] | None:
    if text is None or text == "all":
        return cast("Literal['all'] | None", text)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {text}: give 'all' or numbers such as 1,2,3") from None


def _check(target: str, family: str, fit: str | None) -> None:
    from typing import get_args

    from evengaze.calibration.fit import Family, Fit

    for name, value, known in (
        ("--target", target, ("attention", "frequency")),
        ("--family", family, (*get_args(Family), "rows-columns")),
        ("--fit", fit or "log", get_args(Fit)),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value}: give one of {', '.join(known)}")


@contextmanager
def _resumable(
    path: Path, total: int, fresh: bool
) -> Iterator[tuple[Observations | None, Callable[[Observations], bool]]]:
    """A state file that outlives a kill, and progress. The file is removed once the observation is whole."""
    from evengaze.calibration.observe import Observations

    state = None
    if path.exists() and not fresh:
        try:
            state = Observations.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if isinstance(error, CurveError):
                raise CurveError(f"{path}: {error}") from None
            raise CurveError(f"{path} cannot be read ({error}); delete it and start again") from None
        console.print(f"going on after {state.samples} samples ({path})", style="dim")
    written = time.monotonic()
    latest: dict[str, Any] = {}

    def write() -> None:
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(latest["state"]), encoding="utf-8")
        partial.replace(path)

    with _progress(total, 0 if state is None else state.samples) as advance:

        def after_batch(now: Observations) -> bool:
            nonlocal written
            advance(now.samples)
            if time.monotonic() - written > SAVE_EVERY:
                latest["state"] = now.to_dict()
                write()
                written = time.monotonic()
            return False

        try:
            yield state, after_batch
        except KeyboardInterrupt:
            console.print(f"\nstopped; the same command goes on from {path}" if path.exists() else "\nstopped")
            raise typer.Exit(INTERRUPTED) from None
    path.unlink(missing_ok=True)


@contextmanager
def _progress(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("observing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda samples: progress.update(task, completed=samples)
