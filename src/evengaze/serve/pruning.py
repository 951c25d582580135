"""The method of a request: the server's own, or what the request's `evengaze` field says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

from evengaze.debias import Debias
from evengaze.debias.curve import architecture_of
from evengaze.errors import ConfigError, EvengazeError
from evengaze.evaluate.auto import automatic
from evengaze.evaluate.predictor import Predictor
from evengaze.methods import Pruner, names, parse
from evengaze.models import adapter_for
from evengaze.serve.errors import ApiError
from evengaze.serve.schema import Pruning

_ANY = 256
"""Visual tokens to try a method's schedule with."""


class Methods:
    """Makes pruners for one model."""

    def __init__(self, predictor: Predictor, method: str, debias: str) -> None:
        model: Any = predictor.model
        decoder: Any = adapter_for(model).decoder(model)
        self._model = model
        self._layers = len(decoder.layers)
        self._source = predictor.spec.source
        self._architecture = architecture_of(model.config)
        self._method, self._debias = method, debias
        self._made = lru_cache(maxsize=256)(self._make_of_text)
        self.default = self._make(method, None, debias)

    def try_out(self, graphs: bool) -> None:
        """Attach the server's own method once: what it cannot serve is told before anybody asks.

        Raises:
            EvengazeError: the model cannot be served by the method, or not with graphs.
        """
        self.default(self._model, graphs=graphs).remove()

    def of(self, asked: Pruning) -> Pruner:
        """The method that a request asks for.

        Raises:
            ApiError: there is none such, or it does not fit the model; or it names a file of the server's.
        """
        method, debias = asked.method or self._method, asked.debias or self._debias
        name = method.partition(":")[0].strip().lower()
        if asked.method is not None and name not in ("none", *names()):  # `parse` imports a class named by its module
            known = ", ".join(names())
            raise ApiError(400, f"unknown method {name!r}; there are none, {known}", param="evengaze.method")
        if asked.method is not None and re.search(r"[:,]\s*debias\s*=", asked.method):
            raise ApiError(400, "give debias as a field of its own, beside method", param="evengaze.method")
        if asked.debias is not None and asked.debias.lower().endswith(".json"):
            raise ApiError(
                400,
                "a request may name a preset, padding, auto or none, but no file: `evengaze serve --debias FILE` does",
                param="evengaze.debias",
            )
        try:
            return self._made(method, json.dumps(asked.keep), debias)
        except EvengazeError as error:
            raise ApiError(400, str(error), param="evengaze", code="invalid_method") from None

    def _make_of_text(self, method: str, keep: str, debias: str) -> Pruner:
        """`_make` with the budget as JSON: 1 and 1.0 are equal to a cache, but one is a token and the other all."""
        budget = json.loads(keep)
        return self._make(method, tuple(budget) if isinstance(budget, list) else budget, debias)

    def _make(self, method: str, keep: float | Sequence[float] | None, debias: str) -> Pruner:
        pruner = parse("dense" if method.strip() in ("none", "dense") else method)
        if keep is not None:
            if "keep" not in {f.name for f in fields(pruner)}:
                raise ConfigError(f"{pruner.name} has no parameter keep")
            pruner = pruner.replace(keep=keep)
        pruner.schedule(self._layers, _ANY)
        if debias == "auto" and pruner.debiasing is not None:  # the server's own method says it
            return pruner
        if debias == "auto":
            found = automatic(pruner, source=self._source, architecture=self._architecture, layers=self._layers)
        elif debias == "none":
            found = None
        else:
            found = Debias.parse(debias) if pruner.ranked_stages(self._layers) else None
        return pruner.replace(debias=found)
