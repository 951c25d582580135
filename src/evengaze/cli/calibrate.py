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

from evengaze.cli import output, tables, terminal
from evengaze.cli.options import AsJson, BatchSize, Formats, Images, Limit, Prompts, loads_model
from evengaze.cli.output import INTERRUPTED
from evengaze.errors import ConfigError, CurveError

if TYPE_CHECKING:
    from evengaze.calibration.conclude import Conclusion
    from evengaze.calibration.fit import Family, Fit
    from evengaze.calibration.measures import Measure
    from evengaze.calibration.observe import Observations
    from evengaze.debias.debias import Debias
    from evengaze.evaluate.predictor import ModelSpec
    from evengaze.methods import Pruner

SAVE_EVERY = 15.0
"""Seconds between two writes of the state."""

Method = Annotated[
    str, typer.Option("--method", "-m", help="Whose ranking, as in `evengaze list methods`; the budget only measures.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    from evengaze.cli import curves

    app.command("calibrate")(calibrate)
    app.command("bias")(bias)
    group = typer.Typer(no_args_is_help=True)
    curves.register(group)
    app.add_typer(group, name="curves", help="List, show, compare and validate debias curves.")


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
    from evengaze.cli import session
    from evengaze.debias.curve import Origin
    from evengaze.evaluate.samples import Source, encode

    session.check_output(out, ".json")
    _check(target, family, fit)
    drawn = session.formats(formats)
    if figures is not None:
        session.check_folder(figures)
    pruner, chosen = session.method(method), _layers(layers)
    _check_layers(pruner, chosen, spec)
    source = Source.of(images, prompt or (), limit, model=spec.source, split="calibration", seed=seed)
    loaded = session.Session(spec)
    predictor = loaded.predictor
    with _resumable(out.with_suffix(".state.json"), len(source), fresh) as (state, after_batch):
        seen = [] if state is None else [state]

        def watch(now: Observations) -> bool:
            seen[:] = [now]
            return after_batch(now)

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


@loads_model
def bias(
    spec: ModelSpec,
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
    formats: Formats = "png",
    as_json: AsJson = False,
) -> None:
    """Show at which layers a model's attention is biased by position and padding, how strongly, and what to do.

    With --debias every measure is shown before and after. With a curve file that holds several layers, each layer is
    debiased by its own trend. Exit status 3 if some pictures could not be read; the others are used.
    """
    from evengaze.calibration.calibrate import to_curve
    from evengaze.calibration.conclude import Conclusion
    from evengaze.calibration.fit import fit_curve
    from evengaze.calibration.measures import sigma
    from evengaze.calibration.observe import observe
    from evengaze.cli import session
    from evengaze.evaluate.samples import Source, encode
    from evengaze.viz.bias import plot_heat_maps, plot_layers, plot_trend
    from evengaze.viz.style import save

    drawn, pruner, chosen = session.formats(formats), session.method(method), _layers(layers)
    steps = None if debias is None else _by_layer(debias)
    session.check_folder(out)
    _check_layers(pruner, chosen, spec)
    source = Source.of(images, prompt or (), limit, model=spec.source, split="eval" if debias else "calibration")
    loaded = session.Session(spec)
    predictor = loaded.predictor
    with output.progress("observing", len(source)) as advance:

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
    status = output.skipped(source.skipped)
    if not found.layers:
        raise CurveError("no sample with visual tokens was seen; were there pictures at all?")
    _warn_of_misuse(steps, found, pruner.name)
    before: dict[int, dict[str, Measure]] = {}
    after: dict[int, dict[str, Measure]] = {}
    rows: dict[str, Any] = {}
    for layer, stats in found.layers.items():
        curve = to_curve(found, layer, family="exponential", fit="log", beside=False)
        save(plot_trend(curve), out / f"trend_{layer:02d}.png", drawn)
        before[layer] = {"sigma": sigma(curve.summary), **found.measures(layer)}
        rows[str(layer)] = {"before": _plain(before[layer])}
        if stats.debiased is not None:
            line = fit_curve(stats.debiased.profile(), family="exponential", fit="log", bootstraps=2)
            after[layer] = {"sigma": sigma(line.summary), **found.measures(layer, after=True)}
            rows[str(layer)]["after"] = _plain(after[layer])
        frames = stats.by_frame()
        if len(frames) > 1:
            rows[str(layer)]["frames"] = (frames / frames.mean()).tolist()
    save(plot_heat_maps({k: s.heat_map() for k, s in found.layers.items()}), out / "heat_maps.png", drawn)
    save(plot_layers(before, after), out / "layers.png", drawn)
    conclusion = Conclusion.of(before)
    report = {"method": found.method, "samples": found.samples, "layers": rows, "conclusion": conclusion.to_dict()}
    if after:
        report["conclusion_debiased"] = Conclusion.of(after).to_dict()
    report["skipped"] = source.skipped
    (out / "bias.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if as_json:
        terminal.echo(terminal.as_json(report))
    else:
        title = f"{pruner.name} on {predictor.spec.name}: {found.samples} samples of the {source.name}"
        terminal.echo(_table(title, before, after))
        for name, row in rows.items():
            if "frames" in row:
                terminal.echo(f"layer {name}, mean score by frame: {' '.join(f'{v:.2f}' for v in row['frames'])}")
        terminal.echo(
            "\n"
            + "\n".join(
                tables.lines(conclusion.sentences() if after else _advice(conclusion, spec.source, images, method))
            )
        )
        if after:
            terminal.echo(f"\nDebiased with {debias}:")
            terminal.echo("\n".join(tables.lines(Conclusion.of(after).sentences(debiased=True))))
        names = ", ".join(f"{name}.{'/'.join(drawn)}" for name in ("heat_maps", "layers", "trend_NN"))
        output.note(f"{out}/: {names}, and bias.json with all intervals")
    if status:
        raise typer.Exit(status)


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


def _table(title: str, before: Mapping[int, Mapping[str, Measure]], after: Mapping[int, Any]) -> str:
    """One line a layer, and one for it debiased; what is off is off what no bias would give."""
    from evengaze.calibration.conclude import STRONG, keeps_padding, verdict

    video = any("spearman_frame" in measures for measures in before.values())
    heads = [
        "sigma",
        "Spearman",
        *(["Spearman by frame"] if video else []),
        "place of kept",
        "padding kept",
        "padding/ content",
    ]

    def cells(name: str, measures: Mapping[str, Measure]) -> list[str]:
        said = verdict(measures)
        where = {"even": "even", "unsure": "too few to tell"}.get(said, said)
        if where == said != "even" and abs(measures["kept_index"].value - measures["kept_index"].even) <= STRONG:
            where = f"slightly {said}"
        return [
            name,
            _spread(measures.get("sigma")),
            _spread(measures.get("spearman"), spread=False),
            *([_spread(measures.get("spearman_frame"), spread=False)] if video else []),
            _spread(measures.get("kept_index"), off=True),
            _spread(measures.get("kept_padding"), off=True, spread=False),
            _spread(measures.get("padding_ratio"), spread=False),
            where + (" and padding" if keeps_padding(measures) else ""),
        ]

    rows = []
    for layer, plain in before.items():
        rows.append(cells(str(layer), plain))
        if layer in after:
            rows.append(cells(f"{layer} debiased", after[layer]))
    columns = [tables.name("layer"), *map(tables.Column, heads), tables.text("biased")]
    return tables.table(columns, rows, title=title)


def _spread(measure: Measure | None, *, off: bool = False, spread: bool = True) -> str:
    """A measure, its distance from even if it is `off` that, and half of its interval."""
    if measure is None:
        return ""
    value = f"{measure.value - measure.even:+.2f}" if off else f"{measure.value:.2f}"
    half = (measure.high - measure.low) / 2
    return f"{value} \u00b1{half:.2f}" if spread and half == half else value


def _advice(conclusion: Conclusion, model: str, images: Path | None, method: str) -> list[str]:
    """What the measures mean, and what to type."""
    said = conclusion.sentences()
    if conclusion.strong:
        given, other = ("", "") if images is None else (f" --images {images}", " --images OTHER_PICTURES")
        layers = ",".join(map(str, conclusion.strong))
        said += [
            "Type:",
            f"  evengaze calibrate --model {model}{given} -m {method} --layers {layers} -o curve.json",
            f"  evengaze curves validate curve.json --model {model}{other}",
        ]
    elif conclusion.padding:
        said += ["Type:", f"  evengaze run --model {model} --method {method} --debias padding ..."]
    if conclusion.even and conclusion.strong:
        first = conclusion.even[0]
        said.append(f"Or rank where there is no bias: FastV's layer={first + 1} ranks by layer {first}.")
    return said


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


def _check_layers(pruner: Pruner, chosen: Sequence[int] | Literal["all"] | None, spec: ModelSpec) -> None:
    """Find out before anything is loaded whether the layers exist and the method can rank by them."""
    from evengaze.calibration.observe import rankable
    from evengaze.cli import session

    rankable(pruner, session.depth(spec), chosen)


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

    state = None
    if path.exists() and not fresh:
        try:
            state = Observations.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if isinstance(error, CurveError):
                raise CurveError(f"{path}: {error}") from None
            raise CurveError(f"{path} cannot be read ({error}); delete it and start again") from None
        output.note(f"going on after {state.samples} samples ({path})")
    written = time.monotonic()
    latest: dict[str, Any] = {}

    def write() -> None:
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(latest["state"]), encoding="utf-8")
        partial.replace(path)

    with output.progress("observing", total, 0 if state is None else state.samples) as advance:

        def after_batch(now: Observations) -> bool:
            nonlocal written
            advance(now.samples)
            latest["now"] = now
            if time.monotonic() - written > SAVE_EVERY:
                latest["state"] = now.to_dict()
                write()
                written = time.monotonic()
            return False

        try:
            yield state, after_batch
        except KeyboardInterrupt:
            if latest.get("now") is not None:
                latest["state"] = latest["now"].to_dict()
                write()
            output.note(f"\nstopped; the same command goes on from {path}" if path.exists() else "\nstopped")
            raise typer.Exit(INTERRUPTED) from None
    path.unlink(missing_ok=True)
