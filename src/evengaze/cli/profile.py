"""`evengaze profile`: what methods save on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evengaze.cli import output, terminal
from evengaze.cli.options import AsJson, loads_model
from evengaze.cli.profile_report import contradictions as contradictions
from evengaze.cli.profile_report import plotted, report, written

if TYPE_CHECKING:
    from evengaze.evaluate.spec import ModelSpec
    from evengaze.methods import Pruner
    from evengaze.profile.prompts import Prompt

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
"""Or torch's C++ tells of memory that was allocated before a profile of it began."""
METHODS = "fastv:keep=0.5;fastv:keep=0.25;fastv:keep=0.125"
VISUAL, TEXT = 576, 64
"""Of a prompt whose size was not asked for."""
_PROMPT = "what is in this picture?"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("profile")(profile)


@loads_model
def profile(
    spec: ModelSpec,
    config: Annotated[
        str | None,
        typer.Option(
            help="Instead of --model: a config alone (config.json, folder, hub id or a shape such as llava-1.5-7b); "
            "weights are random, which changes neither time nor memory."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "-m", help="E.g. 'fastv:keep=64', more with ';'; see `evengaze list methods`."),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture; a synthetic one if left out.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help=f"The question. Default: {_PROMPT}")] = None,
    visual: Annotated[
        int | None,
        typer.Option(
            "--visual-tokens",
            min=1,
            help="Instead of --image: pictures of random pixels, of about so many tokens.",
        ),
    ] = None,
    text: Annotated[
        int | None, typer.Option("--text-tokens", min=2, help="Instead of --prompt: so many tokens besides.")
    ] = None,
    new: Annotated[
        int, typer.Option("--new-tokens", min=0, help="Tokens of an answer; with 0 or 1 decoding is not measured.")
    ] = 16,
    batch: Annotated[str, typer.Option(help="Rows, several numbers with commas: 1,8,32.")] = "1",
    graphs: Annotated[bool, typer.Option(help="Also with CUDA graphs between the stages.")] = False,
    static: Annotated[
        bool, typer.Option(help="Also with a static cache, whose decoding is compiled on accelerators.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; the methods take turns in each.")] = 5,
    as_json: AsJson = False,
    csv: Annotated[Path | None, typer.Option(help="Write all figures to a .csv file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the parts: .png, .svg or .pdf.")] = None,
) -> None:
    """Time of tower, decoder, decoding step and whole answer, memory and cache: dense and all methods in turns.

    Beside what is measured stands what the schedules predict, and for each row one sentence on what limits it. The
    dense model is the bare one. For figures without any model, see `evengaze plan`.
    """
    from evengaze.cli import session
    from evengaze.methods import split
    from evengaze.profile.verdict import verdicts

    pruners = _named({name: session.method(name) for name in split(methods or [METHODS])})
    batches = _batches(batch)
    session.check_output(csv, ".csv")
    session.check_output(plot, *session.FIGURES)
    source = _source(spec, config)
    source.check(spec, image=image, prompt=prompt, sizes=(visual, text))
    _check_device(spec, graphs=graphs, static=static)
    pictures = None if image is None else session.read_pictures([image])
    known = session.config_of(source.name, spec.revision, flag=source.flag, shapes=source.random)
    _check_methods(pruners, known, visual, text)
    if source.random:
        made, row = _random(known, spec, visual, text)
    else:
        made, row = _loaded(spec, pictures, prompt or _PROMPT, visual, text)
    rows = verdicts(_measure(made, row, pruners, batches, graphs=graphs, static=static, new=new, rounds=rounds))
    about = {**_about(made, row), "model": source.name, "random_weights": source.random, "rounds": rounds}
    flat = [{**entry.to_dict(), **about} for entry in rows]
    if csv is not None:
        written(csv, flat)
    if plot is not None:
        plotted(plot, flat)
    if as_json:
        terminal.echo(terminal.as_json(flat))
    else:
        report(flat)
    for warning in contradictions(flat):
        output.warn(warning)


# -- what is checked before anything is built --------------------------------------------------------------------------
@dataclass(frozen=True)
class _Source:
    """Where the model comes from.

    Attributes:
        name: hub id, folder, file or shape.
        random: whether its weights are made up.
        flag: the option that said so.
    """

    name: str
    random: bool
    flag: str

    def check(self, spec: ModelSpec, *, image: Any, prompt: Any, sizes: tuple[Any, Any]) -> None:
        """Raise a ConfigError for options that contradict each other."""
        from evengaze.errors import ConfigError

        given = _given({"--image": image, "--prompt": prompt})
        asked = _given(dict(zip(("--visual-tokens", "--text-tokens"), sizes, strict=True)))
        if given and asked:
            raise ConfigError(
                f"{given[0]} and {asked[0]} cannot both be given: the one says which prompt, the other how long a "
                "made-up one is"
            )
        if not self.random:
            return
        if given:
            raise ConfigError(
                f"{given[0]} needs a checkpoint with its processor, but {self.flag} {self.name} has no weights; say "
                "--visual-tokens and --text-tokens instead"
            )
        more = {"--adapter": spec.adapter, "--quantize": spec.quantize, "--allow-missing": spec.allow_missing or None}
        for name in _given(more):
            raise ConfigError(f"{name} is for checkpoints, but the weights of {self.flag} {self.name} are random")
        if spec.device == "balanced":
            raise ConfigError("--device balanced is for checkpoints; random weights are made on one device")


def _given(options: Mapping[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value is not None]


def _source(spec: ModelSpec, config: str | None) -> _Source:
    from evengaze.errors import ConfigError

    model = spec.source
    if config is not None:
        if model != "demo":
            raise ConfigError(f"--config {config} and --model {model} cannot both be given")
        return _Source(config, True, "--config")
    path = Path(model)
    weights = path.is_dir() and any(found.suffix in (".safetensors", ".gguf", ".bin") for found in path.iterdir())
    if path.is_file() or (path.is_dir() and (path / "config.json").is_file() and not weights):
        output.note(f"--model {model} has no weights: random ones are used, which changes neither time nor memory")
        return _Source(model, True, "--model")
    return _Source(model, False, "--model")


def _named(pruners: Mapping[str, Pruner]) -> dict[str, Pruner]:
    """Methods by names that are not the bare model's."""
    names = {"dense": "dense (attached)", "none": "dense (attached)"}
    return {names.get(spec.strip(), spec): pruner for spec, pruner in pruners.items()}


def _batches(text: str) -> tuple[int, ...]:
    from evengaze.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--batch {text}: give whole numbers from 1 on, several with commas, such as 1,8,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _check_device(spec: ModelSpec, *, graphs: bool, static: bool) -> None:
    from evengaze.errors import ConfigError
    from evengaze.evaluate.spec import device_of, dtype_of

    dtype_of(spec.dtype)
    where = device_of(spec.device)
    if graphs and where.type != "cuda":
        raise ConfigError(f"--graphs captures CUDA graphs, but the model would run on {where}; leave it out here")
    if static and where.type not in ("cuda", "xpu"):
        output.note(f"--static: on {where} transformers does not compile decoding; this is the static cache alone")


def _check_methods(pruners: Mapping[str, Pruner], config: Any, visual: int | None, text: int | None) -> None:
    """Raise a ConfigError if a method does not fit the model's depth, or the prompt where its size is known."""
    from evengaze.profile.measure import costs
    from evengaze.profile.plan import depth_of, picture_tokens

    for pruner in pruners.values():
        pruner.stages(depth_of(config))
    size = visual or picture_tokens(config)
    if size is not None:
        costs(config, pruners, size, text or TEXT)


# -- building and measuring --------------------------------------------------------------------------------------------
def _random(config: Any, spec: ModelSpec, visual: int | None, text: int | None) -> tuple[Any, Prompt]:
    import torch

    from evengaze.evaluate.spec import device_of, dtype_of
    from evengaze.profile.build import random_model
    from evengaze.profile.plan import picture_tokens
    from evengaze.profile.prompts import make_prompt

    where, kind = device_of(spec.device), dtype_of(spec.dtype)
    if kind == "auto":
        named = getattr(config, "dtype", None)
        kind = named if isinstance(named, torch.dtype) else torch.float32 if where.type == "cpu" else torch.bfloat16
    model = random_model(config, dtype=kind, device=where, attention=spec.attention)
    return model, make_prompt(model, visual or picture_tokens(config) or VISUAL, text or TEXT)


def _loaded(spec: ModelSpec, pictures: Any, question: str, visual: int | None, text: int | None) -> tuple[Any, Prompt]:
    from evengaze.cli import session
    from evengaze.profile.plan import picture_tokens
    from evengaze.profile.prompts import Prompt, make_prompt

    loaded = session.Session(spec)
    model: Any = loaded.predictor.model
    if visual is not None or text is not None:
        return model, make_prompt(model, visual or picture_tokens(model.config) or VISUAL, text or TEXT)
    shown = [session.sample_picture()] if pictures is None else pictures
    inputs = dict(loaded.inputs(shown, question))
    return model, Prompt(inputs, 0, int(inputs["input_ids"].shape[1]), "the picture given" if pictures else "")


def _measure(
    model: Any,
    row: Prompt,
    pruners: Mapping[str, Pruner],
    batches: tuple[int, ...],
    *,
    graphs: bool,
    static: bool,
    new: int,
    rounds: int,
) -> list[Any]:
    from evengaze.profile.measure import Course

    course = Course(model, row, pruners, graphs=graphs, static=static, new_tokens=new, rounds=rounds)
    rows, done = [], 0
    with output.progress("profiling", 3 * len(batches)) as advance:

        def step() -> None:
            nonlocal done
            done += 1
            advance(done)

        for size in batches:
            rows += course.run(size, step)
    return course.finish(rows)


def _about(model: Any, row: Prompt) -> dict[str, Any]:
    """What the figures depend on besides the rows' own columns."""
    import torch
    import transformers

    from evengaze.profile.plan import depth_of

    device = model.device
    return {
        "model_type": model.config.model_type,
        "layers": depth_of(model.config),
        "pictures": row.shown,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
