"""`evengaze bias`: which layers of a model are biased by position and padding, how strongly, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from evengaze.cli import output, tables, terminal
from evengaze.cli.options import AsJson, BatchSize, Formats, Images, Limit, Method, Prompts, loads_model
from evengaze.errors import CurveError
from evengaze.files import write_whole

if TYPE_CHECKING:
    from evengaze.calibration.bias import Bias
    from evengaze.calibration.conclude import Conclusion
    from evengaze.calibration.measures import Measure
    from evengaze.calibration.observe import Observations
    from evengaze.evaluate.spec import ModelSpec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bias")(bias)


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
    from evengaze.calibration.bias import Bias, warn_of_misuse
    from evengaze.calibration.observe import observe, rankable
    from evengaze.cli import session
    from evengaze.debias import Debias
    from evengaze.evaluate.samples import Source, encode

    drawn, pruner, chosen = session.formats(formats), session.method(method), session.layers_of(layers)
    steps = None if debias is None else Debias.by_layer(debias)
    session.check_folder(out)
    rankable(pruner, session.depth(spec), chosen)
    source = Source.of(images, prompt or (), limit, model=spec.source, split="eval" if debias else "calibration")
    predictor = session.Session(spec).predictor
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
    warn_of_misuse(steps, found, pruner.name)
    measured = Bias.of(found, predictor.spec.name)
    _draw(found, measured, out, drawn)
    report = measured.to_dict() | {"skipped": source.skipped}
    write_whole(out / "bias.json", json.dumps(report, indent=1) + "\n")
    if as_json:
        terminal.echo(terminal.as_json(report))
    else:
        title = f"{pruner.name} on {predictor.spec.name}: {found.samples} samples of the {source.name}"
        terminal.echo(_table(title, measured))
        for layer, means in measured.frames.items():
            terminal.echo(f"layer {layer}, mean score by frame: {' '.join(f'{mean:.2f}' for mean in means)}")
        said = measured.conclusion.sentences()
        left = measured.conclusion_debiased
        advice = [] if left is not None else _advice(measured.conclusion, spec.source, images, method)
        terminal.echo("\n" + "\n".join(tables.lines([*said, *advice])))
        if left is not None:
            terminal.echo(f"\nDebiased with {debias}:")
            terminal.echo("\n".join(tables.lines(left.sentences(debiased=True))))
        names = ", ".join(f"{name}.{'/'.join(drawn)}" for name in ("heat_maps", "layers", "trend_NN"))
        output.note(f"{out}/: {names}, and bias.json with all intervals")
    if status:
        raise typer.Exit(status)


def _draw(found: Observations, measured: Bias, out: Path, drawn: tuple[str, ...]) -> None:
    from evengaze.viz.bias import plot_heat_maps, plot_layers, plot_trend
    from evengaze.viz.style import save

    for layer, curve in measured.curves.items():
        save(plot_trend(curve), out / f"trend_{layer:02d}.png", drawn)
    save(
        plot_heat_maps({layer: stats.heat_map() for layer, stats in found.layers.items()}), out / "heat_maps.png", drawn
    )
    save(plot_layers(measured.plain, measured.debiased), out / "layers.png", drawn)


def _table(title: str, measured: Bias) -> str:
    """One line a layer, and one for it debiased; what is off is off what no bias would give."""
    from evengaze.calibration.conclude import STRONG, keeps_padding, verdict

    video = any("spearman_frame" in measures for measures in measured.plain.values())
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
        where: str = "too few to tell" if said == "unsure" else said
        if where.startswith("to ") and abs(measures["kept_index"].value - measures["kept_index"].even) <= STRONG:
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
    for layer, plain in measured.plain.items():
        rows.append(cells(str(layer), plain))
        if layer in measured.debiased:
            rows.append(cells(f"{layer} debiased", measured.debiased[layer]))
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
    """What to type."""
    said = []
    model, method = quote(model), quote(method)
    if conclusion.strong:
        given, other = ("", "") if images is None else (f" --images {quote(str(images))}", " --images OTHER_PICTURES")
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
