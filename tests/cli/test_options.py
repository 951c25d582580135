from __future__ import annotations

from dataclasses import fields

import pytest
import typer
from typer.main import get_command

from evengaze.cli import build
from evengaze.cli.options import loads_model, overrides_model
from evengaze.evaluate.predictor import ModelSpec

LOADING = {field.name for field in fields(ModelSpec)} - {"source", "prompt"} | {"model"}
LOADS = ("run", "compare", "calibrate", "bias", "curves validate", "evaluate", "profile", "serve", "explore")


def options(command):
    found = get_command(build())
    for name in command.split():
        found = found.commands[name]
    return {parameter.name: parameter for parameter in found.params}


@pytest.mark.parametrize("command", LOADS)
def test_every_command_that_loads_a_model_has_all_of_its_options(command):
    found = options(command)
    assert set(found) >= LOADING
    assert {found[name].rich_help_panel for name in LOADING} == {"Model"}


@pytest.mark.parametrize("command", [name for name in LOADS if name != "evaluate"])
def test_what_is_left_out_is_what_a_spec_has_by_default(command):
    defaults = {field.name: field.default for field in fields(ModelSpec)}
    found = options(command)
    assert found["model"].default == "demo"
    assert all(found[name].default == defaults[name] for name in LOADING - {"model"})


def called(decorator, *arguments):
    """What a command gets that is called with `arguments`."""
    seen = {}

    def with_spec(spec: ModelSpec, number: int = 3) -> None:
        seen.update(given=spec, number=number)

    def with_overrides(loading: dict, number: int = 3) -> None:
        seen.update(given=loading, number=number)

    app = typer.Typer()
    app.command()(decorator(with_spec if decorator is loads_model else with_overrides))
    app(list(arguments), standalone_mode=False)
    return seen


def test_a_command_gets_one_spec():
    text = ["--model", "a/b", "--revision", "r", "--dtype", "bfloat16", "--device", "cpu", "--attention", "eager"]
    text += ["--adapter", "x", "--quantize", "8bit", "--allow-missing", "--number", "5"]
    wanted = ModelSpec("a/b", "r", "bfloat16", "cpu", "eager", allow_missing=True, adapter="x", quantize="8bit")
    assert called(loads_model, *text) == {"given": wanted, "number": 5}
    assert called(loads_model) == {"given": ModelSpec("demo"), "number": 3}


def test_a_command_with_a_recipe_gets_only_what_was_given():
    assert called(overrides_model) == {"given": {}, "number": 3}
    assert called(overrides_model, "--device", "cpu", "--allow-missing")["given"] == {
        "device": "cpu",
        "allow_missing": True,
    }
