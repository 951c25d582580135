"""Settings and published figures from YAML files, shipped ones by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from evengaze.errors import ConfigError
from evengaze.evaluate.grid import Plan
from evengaze.evaluate.setting import DEFAULT, Setting
from evengaze.evaluate.spec import ModelSpec
from evengaze.files import read_text
from evengaze.methods import split
from evengaze.parameters import coerce

_FOLDER = files("evengaze.recipes")
_PUBLISHED = "published"
_FLAT = {"source": "model"}
_LISTS = ("benchmarks", "methods", "debias", "budgets", "baselines")


def names() -> tuple[str, ...]:
    """Names of the shipped recipes."""
    found = (item.name.removesuffix(".yaml") for item in _FOLDER.iterdir() if item.name.endswith(".yaml"))
    return tuple(sorted(name for name in found if name != _PUBLISHED))


@dataclass(frozen=True)
class Recipe:
    """What `evengaze evaluate` is asked to do.

    In YAML and on the command line the fields of its parts stand side by side.

    Attributes:
        model: what to load; `model` in YAML is its `source`.
        plan: what the grid contains.
        setting: how is asked.
        benchmarks: names.
        description: one line for people.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    plan: Plan = field(default_factory=Plan)
    setting: Setting = DEFAULT
    benchmarks: tuple[str, ...] = ()
    description: str = ""

    def __post_init__(self) -> None:
        coerce(self, "recipe")

    @classmethod
    def load(cls, name: str) -> Recipe:
        """Read a YAML file, or a shipped recipe by its name.

        Raises:
            ConfigError: there is none, or it has an unknown field.
        """
        path = Path(name)
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise ConfigError(f"recipe {name} does not exist. Shipped ones: {', '.join(names())}")
            text = read_text(path)
        elif name in names():
            text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        else:
            raise ConfigError(f"recipe {name}: give a .yaml file or one of {', '.join(names())}")
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
            raise ConfigError(f"recipe {name} is no valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"recipe {name} must hold options such as 'model: demo'")
        try:
            return cls().overridden(values)
        except ConfigError as error:
            raise ConfigError(f"recipe {name}: {error}") from None

    def overridden(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with other values.

        Raises:
            ConfigError: an unknown field, or a value of the wrong kind.
        """
        parts: dict[str, Any] = {"model": self.model, "plan": self.plan, "setting": self.setting}
        home = {_FLAT.get(f.name, f.name): (part, f.name) for part, held in parts.items() for f in fields(held)}
        home |= {name: ("", name) for name in ("benchmarks", "description")}
        unknown = [str(key) for key in values if key not in home]
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; there are {', '.join(sorted(home))}")
        changed: dict[str, dict[str, Any]] = {"": {}, **{part: {} for part in parts}}
        for key, value in values.items():
            part, name = home[key]
            if key in _LISTS and not isinstance(value, (list, tuple)):
                raise ConfigError(f"{key} must be a list, not {value!r:.200}")
            if key in ("methods", "debias", "benchmarks", "baselines") and not all(isinstance(v, str) for v in value):
                raise ConfigError(f"{key} must be a list of strings, not {list(value)!r:.200}")
            changed[part][name] = split(value) if key == "methods" else value
        if changed["plan"].get("debias") in ((), []):
            changed["plan"]["debias"] = ("none",)
        made: dict[str, Any] = {part: replace(held, **changed[part]) for part, held in parts.items()}
        return replace(self, **made, **changed[""])


def published() -> dict[str, Any]:
    """The published figures: `sources`, `rows` and `averages`, as in recipes/published.yaml."""
    values: dict[str, Any] = yaml.safe_load((_FOLDER / f"{_PUBLISHED}.yaml").read_text(encoding="utf-8"))
    return values
