"""`Pruner`, the base class of all methods: from scores to a selection, and from a method to an attached model."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from torch import Tensor, nn

from evengaze.debias import Debias
from evengaze.engine import selfcheck
from evengaze.engine.graphs import Graphs
from evengaze.engine.question import Said
from evengaze.engine.session import Handle
from evengaze.errors import ConfigError, ScoreError
from evengaze.layout import VisualLayout
from evengaze.memory import Shared
from evengaze.methods.fitting import fitted_changes
from evengaze.methods.ranking import Allowed, Ranking, Unpadded, content, debiased, every
from evengaze.methods.scope import select_parts
from evengaze.models.base import Adapter, architecture_of
from evengaze.parameters import coerce
from evengaze.protocol import (
    SOURCES,
    Mode,
    Pending,
    Positions,
    Scope,
    Selection,
    Source,
    Stage,
    View,
    top_allowed,
)
from evengaze.schedule import Schedule, Visual

_DEBIAS = "a Debias, 'padding', a preset's name, a curve file that ends in .json, or None"


@dataclass(frozen=True)
class Pruner(ABC):
    """Base class of all methods: a frozen dataclass of its parameters.

    A method implements `stages`, `score` and `budget`; one that merges overrides `choose`. Calling a pruner on a
    model attaches it: `with pruner(model) as run: model.generate(...)`.

    Values of another type than a field's annotation says are an error; numpy's numbers and lists become Python's
    numbers and tuples (`evengaze.parameters`).

    Attributes:
        debias: the two debiasing steps, applied to the language-to-vision ranking. As text, what `Debias.parse` takes:
            "padding", a preset's name or a curve file; it is stored as a `Debias`.
        mode: "corrected" (default) or "official", the published code's choices, quirks included.
        scope: what a budget is for: all visual tokens of a "prompt" (default), those of each "image" (or video), or
            those of each "frame" (or tile).
    """

    debias: Debias | str | Path | None = field(default=None, kw_only=True, metadata={"expected": _DEBIAS})
    mode: Mode = field(default="corrected", kw_only=True)
    scope: Scope = field(default="prompt", kw_only=True)

    name: ClassVar[str]
    positions: ClassVar[Positions] = "original"
    freezes: ClassVar[bool] = True
    """Whether, without a cache, later tokens of a generation repeat the prefill's selection instead of ranking anew."""
    counts_rest: ClassVar[bool] = False
    """Whether what `choose` does depends on how many candidates may be chosen, not only on how many are kept."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        abstract = any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls))
        name = getattr(cls, "name", None)
        if not abstract and not (isinstance(name, str) and name):
            raise ConfigError(
                f"the method {cls.__qualname__} needs a name, by which files and the command line call it: write "
                'name: ClassVar[str] = "..." in the class'
            )
        _one_of(cls, "attention", SOURCES)
        _one_of(cls, "positions", get_args(Positions))

    def __post_init__(self) -> None:
        coerce(self)
        if isinstance(self.debias, (str, Path)):
            object.__setattr__(self, "debias", Debias.parse(str(self.debias)))

    @property
    def debiasing(self) -> Debias | None:
        """`debias` as it is stored."""
        assert not isinstance(self.debias, (str, Path))
        return self.debias

    # -- what a method says ---------------------------------------------------------------------------------------
    @abstractmethod
    def stages(self, layers: int) -> Sequence[Stage]:
        """The stages, by ascending layer, for a decoder of `layers` layers."""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """(rows, n) scores of the candidates; larger means keep."""

    @abstractmethod
    def budget(self, stage: int, current: int, original: int) -> int:
        """How many of `current` candidates survive a stage, given the `original` number of visual tokens."""

    def size_after(self, stage: int, current: int, original: int) -> int:
        """Visual tokens that go on after a stage: survivors and recycled ones."""
        return min(current, self.budget(stage, current, original))

    def with_keep(self, tokens: int, visual: int) -> Self:
        """The same method with about `tokens` of `visual` tokens left after its first stage, other stages in
        proportion. `schedule.solve_for_budget` turns this knob."""
        raise ConfigError(f"{self.name} has no budget to solve for")

    @property
    def in_tower(self) -> bool:
        """Whether the method acts in the vision tower, or reads its attention."""
        return False

    def language_to_vision(self, stage: int) -> bool:
        """Whether the attention that a stage reads is paid by text, which is what debiasing corrects.

        Stages that read none are never debiased, whatever this says.
        """
        return True

    def by_text(self, sources: Sequence[Source]) -> list[bool]:
        """For stages that read from the given sources, in order: whether each ranks by attention from text."""
        return [source is not None and self.language_to_vision(i) for i, source in enumerate(sources)]

    def ranked_stages(self, layers: int) -> list[Stage]:
        """The stages that rank by attention from text, for a decoder of `layers` layers."""
        stages = self.stages(layers)
        return list(itertools.compress(stages, self.by_text([stage.attention for stage in stages])))

    def ranked_layer(self, layers: int) -> int | None:
        """The decoder layer by whose attention from text tokens are first ranked, of `layers`; None if by none."""
        return next((stage.attended for stage in self.ranked_stages(layers)), None)

    def prepare(self, model: nn.Module, adapter: Adapter | None, shared: Shared) -> Callable[[], None]:
        """Called when the pruner is attached. A method that acts outside the decoder (in a vision tower) hooks it here.

        Args:
            model: the model.
            adapter: its family's adapter; None if the caller gave an explicit layout.
            shared: lives as long as the attachment, and is the same for the calls of all threads; it is `View.shared`.
                `shared.notes()` is the store of the running call: what encoder hooks put into it is in the `View.notes`
                of the prefill that uses the pictures. `shared.call()` is a store that ends with the running call.

        Returns:
            A function that undoes it.
        """
        return lambda: None

    # -- the shared way from scores to a selection ------------------------------------------------------------------
    def select(self, view: View) -> Sequence[Selection]:
        """What the engine calls: selections for the rows, or for each part of them that has its own budget."""
        if self.scope == "prompt":
            return self._select(view)
        return select_parts(view, self.scope, self._select)

    def _select(self, view: View) -> Sequence[Selection]:
        """All candidates if the budget allows it (the dense model, padding included), else what `choose` says."""
        count = self.count(view)
        if count >= len(view) and self.mode == "corrected":
            return [Selection.everything(view)]
        ranking = self.ranked(view)
        alike: dict[tuple[int, int], list[int]] = {}
        for b, (kept, valid) in enumerate(zip(self.kept(view, ranking, count), ranking.valid, strict=True)):
            alike.setdefault((kept, valid if self.counts_rest else 0), []).append(b)
        return [self._chosen(view, ranking, rows, kept) for (kept, _), rows in alike.items()]

    def count(self, view: View) -> int:
        """How many candidates of each row survive: the budget, of which a prompt that ends in the picture spends one on
        its last token."""
        count = self.budget(view.stage, len(view) + view.pinned, view.original)
        return max(1, count - view.pinned)

    def _chosen(self, view: View, ranking: Ranking, rows: list[int], count: int) -> Selection:
        ranking = ranking.select(rows)
        chosen = self.choose(view.select(rows), ranking, count)
        return replace(chosen, raw=ranking.raw, scores=ranking.score, rows=tuple(rows), pending=ranking.pending)

    def kept(self, view: View, ranking: Ranking, count: int) -> Sequence[int]:
        """How many tokens each row keeps: `count`, or all that may be kept if these are fewer."""
        return [min(count, valid) for valid in ranking.valid]

    def choose(self, view: View, ranking: Ranking, count: int) -> Selection:
        """Keep the best `count` candidates by debiased score.

        Args:
            view: rows that keep the same number of tokens (and may choose among the same number, if `counts_rest`).
            ranking: of their candidates.
            count: how many to keep, at most as many as may be chosen.
        """
        return Selection(keep=top_allowed(ranking.score, ranking.allowed, count))

    def ranked(self, view: View) -> Ranking:
        """Scores after debiasing, and which candidates may be chosen at all."""
        raw = self.score(view).float()
        if raw.shape != (len(view.rows), len(view)):
            raise ScoreError(
                f"{self.name} scored {tuple(raw.shape)} for {len(view)} visual tokens in {len(view.rows)} rows"
            )
        pending = self._look_for_nan(raw, view.stage)
        score, (allowed, valid) = raw, every(view)
        *before, now = self.by_text(view.sources)
        earlier = sum(before)
        debias = self.debiasing
        if debias is not None and now and debias.applies(earlier):
            score, (allowed, valid) = self.debiased(debias, raw, view)
        elif debias is not None and self.mode == "corrected" and earlier:
            allowed, valid = content(debias, view, official=False)  # padding stays out of later rankings, too
        if debias is not None and self.mode == "corrected" and (now or earlier):
            view.memory.put(Unpadded())
        return Ranking(raw, score, allowed, valid, pending)

    def _look_for_nan(self, raw: Tensor, stage: int) -> Pending | None:
        if not raw.numel():
            return None

        def complain(largest: float) -> None:
            if largest != largest:
                raise ScoreError(
                    f"{self.name} produced NaN scores at stage {stage}. The model's hidden states are probably not "
                    "finite: try bfloat16 or float32 instead of float16, or check the inputs."
                )

        pending = Pending(raw.amax(), complain)  # NaN if any score is
        if raw.device.type == "cpu":
            pending.check()
            return None
        return pending

    def debiased(self, debias: Debias, raw: Tensor, view: View) -> tuple[Tensor, Allowed]:
        """Apply the debiasing steps; a method overrides this only where its official patch computes them otherwise."""
        return debiased(debias, raw, view, official=self.mode == "official")

    # -- use ----------------------------------------------------------------------------------------------------
    def __call__(
        self,
        model: nn.Module,
        *,
        layout: VisualLayout | None = None,
        question: Said = None,
        rerank: bool = False,
        graphs: bool | Graphs = False,
    ) -> Handle:
        """Attach to a model; use the result as a context manager, or call its `remove()`.

        Args:
            model: a transformers model.
            layout: where the visual tokens are; found by the family's adapter if left out.
            question: where prompts end, if prompt and answer are one call and no `labels` or `logits_to_keep` say it:
                the number of tokens of the prompt (one for all rows or one for each, batch padding in front counted
                in), a (B, L) bool mask of the tokens that ask, a function of the (B, L) token ids that gives either for
                each call, or "logits_to_keep": the first token whose logits are asked for ends the prompt.
                `handle.question` may be set anew between calls. See docs/training.md.
            rerank: whether a later turn in `generate` with the cache of earlier ones ranks their pictures anew, by its
                own question. It reads the whole conversation again, and so needs all of its pictures again. By default
                a picture's tokens stay as the first question chose them.
            graphs: capture the vision tower and the layers between stages as CUDA graphs, one for each shape that comes
                a second time, and replay them: exact, and much faster where the host cannot keep up with the GPU (one
                or two rows). For inference on a single GPU. True keeps them while attached; give the same
                `evengaze.Graphs()` to each attachment to keep them longer. See docs/graphs.md.
        """
        selfcheck.ensure()
        handle = Handle(model, self, layout, question=question, rerank=rerank, freeze=self.freezes, graphs=graphs)
        method: Any = handle.pruner  # this one, or the same at layers that attend
        if self.debiasing is not None and method.stages(handle.depth):
            layer = method.ranked_layer(handle.depth)
            try:
                self.debiasing.check(architecture=architecture_of(handle.model.config), method=self.name, layer=layer)
            except BaseException:  # warnings may be errors
                handle.remove()
                raise
        return handle

    def fitted(self, depth: int, attending: Sequence[int]) -> Self:
        """The same method for a decoder of `depth` layers of which some attend: default stage layers move to those;
        layers that were given stay where they are."""
        return self.replace(**fitted_changes(self, depth, attending))

    def schedule(self, layers: int, visual: Visual) -> Schedule:
        """Visual tokens entering each layer, for `visual` tokens at the start; see `schedule.Visual`."""
        return Schedule.of(self, layers=layers, visual=visual)

    def replace(self, **changes: Any) -> Self:
        """A copy with other parameters."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The parameters as JSON-able values; `methods.from_dict` reads them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "debias"}
        values = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in values.items()}
        if self.scope == "prompt":  # the default has no effect on a fingerprint
            values.pop("scope")
        return {"method": self.name, **values, "debias": None if self.debiasing is None else self.debiasing.to_dict()}


def _one_of(cls: type, name: str, allowed: Sequence[Any]) -> None:
    """Raise a ConfigError unless a class attribute, where a class sets it, has one of the allowed values."""
    value = cls.__dict__.get(name)
    if isinstance(value, str) and value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise ConfigError(f"{cls.__qualname__}: {name} must be one of {known}, not {value!r}")


def attach(
    model: nn.Module,
    pruner: Pruner,
    *,
    layout: VisualLayout | None = None,
    question: Said = None,
    rerank: bool = False,
    graphs: bool | Graphs = False,
) -> Handle:
    """Prune a model's visual tokens from now on, until the returned handle is removed.

    Args:
        model: a transformers model. Its `generate()` and forward are used as always.
        pruner: the method.
        layout: where the visual tokens are, for a bare decoder or an unknown family; found by the family's adapter if
            left out.
        question: where prompts end, if not at the end of their calls; see `Pruner.__call__`.
        rerank: whether later turns in `generate` rank anew; see `Pruner.__call__`.
        graphs: capture and replay CUDA graphs; see `Pruner.__call__`.

    Raises:
        AttachError: the model is attached already, or its attention cannot be read.
        UnsupportedModelError: no adapter serves the model.
        ConfigError: the method's stages do not fit the model.
        IncompatibleReleaseError: pruning does not work with the installed transformers.
    """
    return pruner(model, layout=layout, question=question, rerank=rerank, graphs=graphs)
