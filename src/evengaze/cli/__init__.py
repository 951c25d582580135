"""The command line. Importing it must stay cheap: commands import torch when they run, not before."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from evengaze.cli import output, terminal
from evengaze.errors import EvengazeError

__all__ = ["ERROR", "build", "main"]

ERROR = 2
"""Exit status of a command that ended with an error of ours."""

_COMMANDS = (
    *("demo", "run", "calibrate", "bias", "curves", "evaluate", "profile", "plan", "doctor", "serve", "explore", "env"),
)
_LISTING = ("listing", "score")
"""Modules that add a command to `evengaze list` as well."""


def build() -> typer.Typer:
    """The app with all commands; every module in this package has a `register`."""
    app = typer.Typer(
        name="evengaze",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    listing = typer.Typer(no_args_is_help=True)
    for name in _COMMANDS:
        import_module(f"evengaze.cli.{name}").register(app)
    for name in _LISTING:
        import_module(f"evengaze.cli.{name}").register(app, listing)
    app.add_typer(listing, name="list", help="List methods, models, presets and benchmarks.")
    _reflow(app)
    return app


def _reflow(app: typer.Typer) -> None:
    """Let help text wrap where the screen ends: in a docstring's later paragraphs typer keeps the source's lines."""
    for command in app.registered_commands:
        paragraphs = (getattr(command.callback, "__doc__", None) or "").split("\n\n")
        command.help = command.help or "\n\n".join(" ".join(text.split()) for text in paragraphs)
        command.epilog = output.ANYWHERE
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _reflow(group.typer_instance)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of ours, or a file that cannot be read or written, becomes one red line."""
    given = output.take(sys.argv[1:] if arguments is None else arguments)
    _quiet()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            output.here()
            for plugin in output.voice.plugins:
                _import(plugin)
            build()(given, prog_name="evengaze")
    except (EvengazeError, OSError) as error:
        if output.voice.debug or (
            isinstance(error, OSError) and error.filename is None
        ):  # not a file that the user named
            raise
        terminal.secho(f"Error: {output.spoken(error)}", fg=typer.colors.RED, bold=True, err=True)
        sys.exit(ERROR)


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    """A warning as one line, without the place in the code that it comes from."""
    if type(message).__name__ == "DecompressionBombWarning":  # Pillow's, which speaks of an attack
        message = "a picture has very many pixels; models see about a thousand a side, so a smaller copy is quicker"
    output.warn(message)


def _import(plugin: str) -> None:
    """A module or file whose methods and adapters shall be known."""
    from evengaze.methods import load

    load(plugin)


def _quiet() -> None:
    """Keep advice of other libraries out of the output, unless the user has asked for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if output.voice.verbose else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not output.voice.verbose:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, needed or not


def _version(asked: bool) -> None:
    if asked:
        from evengaze.version import __version__

        terminal.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say errors only; works anywhere.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more; works anywhere.")] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", help="Import a module or .py file that registers methods first; works anywhere."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    """Drop most of a vision-language model's image tokens, chosen without position and padding bias."""
