"""What the explorer shows: one question answered dense, pruned, and pruned with debiasing."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from dataclasses import dataclass, fields
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from evengaze.debias import CurveWarning, Debias
from evengaze.debias.curve import architecture_of
from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.auto import automatic
from evengaze.evaluate.predictor import Predictor
from evengaze.methods import Pruner, get
from evengaze.models import adapter_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from evengaze.trace import Trace

METHODS = (
    "fastv",
    "pyramiddrop",
    "sparsevlm",
    "himap",
    "tokencarve",
    "illava",
    "visionzip",
    "divprune",
    "tome",
    "random",
    "uniform",
)
STEPS = ("both", "padding", "trend")
LONGEST_QUESTION = 500
TEMPLATE = "vicuna_v1"
"""Of models that are asked as LLaVA's scripts do; see `evengaze.evaluate.conversation`."""
_REMEMBERED = 128
"""Runs that are not made again: three a question."""


@dataclass(frozen=True)
class Choice:
    """What the controls say.

    Attributes:
        method: one of `METHODS`.
        keep: share of the visual tokens that the first stage leaves.
        layer: before which tokens leave, for methods with one stage.
        steps: "both" debias steps, or one of them.
    """

    method: str = "fastv"
    keep: float = 0.25
    layer: int = 2
    steps: str = "both"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"there is no method {self.method!r} here, only {', '.join(METHODS)}")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"the share of kept tokens must be above 0 and at most 1, not {self.keep}")
        if self.steps not in STEPS:
            raise ConfigError(f"debias must be one of {', '.join(STEPS)}, not {self.steps!r}")


@dataclass(frozen=True)
class Run:
    """One answer.

    Attributes:
        answer: the text.
        pruner: the method.
        trace: what was kept.
        seconds: until the first token, measured once; the vision tower is part of it.
    """

    answer: str
    pruner: Pruner
    trace: Trace
    seconds: float


@dataclass(frozen=True)
class Findings:
    """Everything about one question.

    Attributes:
        picture: the picture.
        question: the question.
        dense: all tokens.
        plain: the method as published, without debiasing.
        debiased: the method with the chosen steps; None if it does not rank by attention from text.
        debias: those steps.
        note: where the curve was calibrated for something else, what that is.
    """

    picture: Image
    question: str
    dense: Run
    plain: Run
    debiased: Run | None
    debias: Debias | None
    note: str = ""


class Explorer:
    """A model that answers what the controls ask, one question at a time; answers are remembered."""

    def __init__(self, predictor: Predictor, new_tokens: int = 16) -> None:
        self._predictor, self._new_tokens = predictor, new_tokens
        self._lock = Lock()
        self._known: OrderedDict[tuple[str, str, str], Run] = OrderedDict()
        model: Any = predictor.model
        self._architecture = architecture_of(model.config)
        decoder: Any = adapter_for(model).decoder(model)
        self.layers = len(decoder.layers)

    @property
    def model(self) -> str:
        """The model's name."""
        return self._predictor.spec.name

    def find(self, picture: Image, question: str, choice: Choice) -> Findings:
        """Answer a question in all three ways.

        Raises:
            DataError: the question is empty, too long, or holds what the model takes for a picture.
            ConfigError: the method does not fit the model.
        """
        question = question.strip()
        if not question:
            raise DataError("type a question about the picture")
        if len(question) > LONGEST_QUESTION:
            raise DataError(f"the question has {len(question)} characters; ask in at most {LONGEST_QUESTION}")
        with self._lock:
            dense = self._run(picture, question, get("dense")())
            plain = self.pruner(choice, len(dense.trace.layout.rows[0]))
            debias = self.debias(plain, choice.steps)
            debiased = None if debias is None else self._run(picture, question, plain.replace(debias=debias))
            return Findings(
                picture,
                question,
                dense,
                self._run(picture, question, plain),
                debiased,
                debias,
                self._note(plain, debias),
            )

    def pruner(self, choice: Choice, visual: int) -> Pruner:
        """The plain method for `visual` tokens."""
        method = get(choice.method)
        single = any(f.name == "layer" for f in fields(method))
        plain = method(layer=choice.layer) if single else method()  # type: ignore[call-arg]
        plain = plain.with_keep(max(1, round(choice.keep * visual)), visual)
        plain.schedule(self.layers, visual)  # says what does not fit
        return plain

    def debias(self, pruner: Pruner, steps: str) -> Debias | None:
        """The chosen steps of the best debiasing that is known."""
        found = automatic(
            pruner, source=self._predictor.spec.source, architecture=self._architecture, layers=self.layers
        )
        if found is None or steps == "both":
            return found
        if steps == "padding":
            return Debias(padding=found.padding)
        return Debias(trend=found.trend, origin=found.origin, curve=found.curve)

    def _note(self, pruner: Pruner, debias: Debias | None) -> str:
        if debias is None or debias.origin is None:
            return ""
        layer = pruner.ranked_layer(self.layers)
        found = debias.origin.differences(architecture=self._architecture, method=pruner.name, layer=layer)
        return f"The curve was calibrated for {' and '.join(found)}." if found else ""

    def _run(self, picture: Image, question: str, pruner: Pruner) -> Run:
        digest = hashlib.sha256(picture.tobytes() + str(picture.size).encode()).hexdigest()
        key = (digest, question, json.dumps(pruner.to_dict(), sort_keys=True))
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        text = self._predictor.ask(question, ["image"], TEMPLATE)
        inputs = self._predictor.inputs([text], {"images": [[picture]]})
        clock = _FirstToken()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurveWarning)  # `note` says it
            (answer,), trace = self._predictor.complete(
                inputs, pruner, max_new_tokens=self._new_tokens, stopping_criteria=StoppingCriteriaList([clock])
            )
        if trace is None:
            raise DataError("the model saw no visual tokens in this prompt")
        run = self._known[key] = Run(answer, pruner, trace, clock.seconds)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return run


class _FirstToken(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first token is there; stops nothing."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seconds = self.seconds or perf_counter() - self._start
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
