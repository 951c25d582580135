"""Settings and published figures from YAML files, shipped ones by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from evengaze.errors import ConfigError
from evengaze.evaluate.conversation import Style
from evengaze.evaluate.grid import BASELINES, Plan
from evengaze.evaluate.predictor import ModelSpec
from evengaze.methods import split

_FOLDER = files("evengaze.recipes")
_PUBLISHED = "published"
_LISTS = ("benchmarks", "methods", "debias", "budgets", "baselines")


def names() -> tuple[str, ...]:
    """Names of the shipped recipes."""
    found = (item.name.removesuffix(".yaml") for item in _FOLDER.iterdir() if item.name.endswith(".yaml"))
    return tuple(sorted(name for name in found if name != _PUBLISHED))


@dataclass(frozen=True)
class Recipe:
    """What `evengaze evaluate` is asked to do; the fields are its options.

    Attributes:
        description: one line for people.
        model: see `ModelSpec.source`; the next eight fields as there.
        benchmarks: names.
        methods: see `Plan`; the next three fields as there.
        limit: see `Job`; the rest as there.
    """

    description: str = ""
    model: str = ""
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    prompt: Style = "auto"
    allow_missing: bool = False
    adapter: str | None = None
    quantize: str | None = None
    benchmarks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("none",)
    debias: tuple[str, ...] = ("none",)
    budgets: tuple[float, ...] = ()
    baselines: tuple[str, ...] = BASELINES
    limit: int | None = None
    shuffle_seed: int | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None

    @classmethod
    def load(cls, name: str) -> Recipe:
        """Read a YAML file, or a shipped recipe by its name.

        Raises:
            ConfigError: there is none, or it has an unknown field.
        """
        path = Path(name)
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise ConfigError(f"--recipe {name} does not exist. Shipped ones: {', '.join(names())}")
            text = path.read_text(encoding="utf-8")
        elif name in names():
            text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        else:
            raise ConfigError(f"--recipe {name}: give a .yaml file or one of {', '.join(names())}")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--recipe {name} is no valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"--recipe {name} must hold options such as 'model: demo'")
        try:
            return cls().overridden(values)
        except ConfigError as error:
            raise ConfigError(f"--recipe {name}: {error}") from None

    def overridden(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with other values.

        Raises:
            ConfigError: an unknown field, or a value of the wrong kind.
        """
        known = {f.name for f in fields(self)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        changed = dict(values)
        for key in _LISTS:
            if key in changed:
                if not isinstance(changed[key], (list, tuple)):
                    raise ConfigError(f"{key} must be a list, not {changed[key]!r}")
                changed[key] = tuple(changed[key])
        if "methods" in changed:
            changed["methods"] = split(changed["methods"])
        if "budgets" in changed and not all(isinstance(b, (int, float)) and b > 0 for b in changed["budgets"]):
            raise ConfigError(f"budgets must be numbers of tokens, not {list(changed['budgets'])}")
        if changed.get("prompt") not in (None, "auto", "official", "chat"):
            raise ConfigError(f"prompt must be auto, official or chat, not {changed['prompt']!r}")
        return replace(self, **changed)

    @property
    def plan(self) -> Plan:
        """What the grid contains."""
        return Plan(self.methods, self.debias or ("none",), self.budgets, self.baselines)

    @property
    def model_spec(self) -> ModelSpec:
        """What to load."""
        names = [f.name for f in fields(ModelSpec) if f.name != "source"]
        return ModelSpec(self.model, **{name: getattr(self, name) for name in names})


def published() -> dict[str, Any]:
    """The published figures: `sources`, `rows` and `averages`, as in recipes/published.yaml."""
    values: dict[str, Any] = yaml.safe_load((_FOLDER / f"{_PUBLISHED}.yaml").read_text(encoding="utf-8"))
    return values
