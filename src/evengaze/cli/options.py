"""Options that several commands share, with the same name and meaning in all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_MODEL = "Model"

Model = Annotated[
    str, typer.Option("--model", help="Hub id, local folder, or 'demo' (embedded).", rich_help_panel=_MODEL)
]
Revision = Annotated[
    str | None, typer.Option(help="Commit, branch or tag of the model on the hub.", rich_help_panel=_MODEL)
]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda:1, ..., or balanced (several GPUs).", rich_help_panel=_MODEL)
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention implementation: sdpa, eager, flash_attention_2, ...; `evengaze env` lists yours.",
        rich_help_panel=_MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="LoRA to put on the model: local folder or hub id (needs peft).", rich_help_panel=_MODEL),
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Quantise the weights on loading: 8bit or 4bit (needs bitsandbytes).", rich_help_panel=_MODEL),
]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing",
        help="Load a checkpoint that lacks weights, with random numbers for them.",
        rich_help_panel=_MODEL,
    ),
]

Images = Annotated[
    Path | None,
    typer.Option(
        help="Folder of pictures or of videos, or .jsonl of {image or video, prompt} such as LLaVA's question files. "
        "Default, for 'demo': the embedded set."
    ),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Asked in turn; repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use so many samples, spread evenly.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples a forward call.")]
Method = Annotated[
    str, typer.Option("--method", "-m", help="Whose ranking, as in `evengaze list methods`; the budget only measures.")
]
Formats = Annotated[
    str, typer.Option("--formats", help="Of the figures: png, pdf, svg; several with commas, 'png,pdf'.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_OF_MODEL: Mapping[str, tuple[Any, Any]] = {
    "model": (Model, "demo"),
    "revision": (Revision, None),
    "dtype": (DType, "auto"),
    "device": (Device, "auto"),
    "attention": (Attention, None),
    "adapter": (Adapter, None),
    "quantize": (Quantize, None),
    "allow_missing": (AllowMissing, False),
}
"""The options that say which model to load and how, with their defaults."""

Command = Callable[..., None]


def loads_model(command: Command) -> Command:
    """Give a command the options of the model in place of its parameter `spec`, a `ModelSpec` made of them."""

    @wraps(command)
    def with_spec(**given: Any) -> None:
        from evengaze.evaluate.spec import ModelSpec

        chosen = {name: given.pop(name) for name in _OF_MODEL}
        command(spec=ModelSpec(chosen.pop("model"), **chosen), **given)

    return _typed(with_spec, command, "spec", _OF_MODEL)


def overrides_model(command: Command) -> Command:
    """Give a command the options of the model in place of its parameter `loading`: a dictionary of those given."""

    @wraps(command)
    def with_overrides(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in _OF_MODEL}
        command(loading={name: value for name, value in chosen.items() if value is not None}, **given)

    optional = {name: (_or_none(option), None) for name, (option, _) in _OF_MODEL.items()}
    return _typed(with_overrides, command, "loading", optional)


def _or_none(option: Any) -> Any:
    """An option that may be left out; of a flag, that is not the same as "no"."""
    (settings,) = option.__metadata__
    return Annotated[option.__origin__ | None, settings]


def _typed(wrapper: Command, command: Command, name: str, options: Mapping[str, tuple[Any, Any]]) -> Command:
    """Make typer see a command's own parameters, and `options` in place of the parameter called `name`."""
    hints = get_type_hints(command, localns={"ModelSpec": Any}, include_extras=True)  # torch is not imported for it
    hints = {key: hint for key, hint in hints.items() if key != name}
    hints |= {key: option for key, (option, _) in options.items()}
    kind = inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(command).parameters.values()
    parameters = [
        inspect.Parameter(p.name, kind, default=p.default, annotation=hints[p.name]) for p in own if p.name != name
    ]
    parameters += [inspect.Parameter(key, kind, default=d, annotation=hints[key]) for key, (_, d) in options.items()]
    wrapper.__annotations__ = hints
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return wrapper
