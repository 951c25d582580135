"""The protocol of a pruning method.

A method never sees a batch, a cache or a mask. It says at which decoder layers it acts (`stages`), gives every visual
token of *one* prompt a score (`score`), and, if it does more than keep the best, what becomes of the rest (`choose`).
The engine (`evengaze.engine`) calls it row by row and owns everything else. Five concepts:

* `Stage`: before which layer, whose attention is read ("previous": the layer that has just run; "own": the layer about
  to run; None: no attention), and whether the layers below forget the dropped tokens, too.
* `View`: one row at one stage: the surviving visual tokens, hidden states, attention received from chosen queries.
* `score`: (n,) float32, larger means keep. Debiasing is applied to it here, once, for all methods.
* `Selection`: which tokens survive (`choose`), and the linear merges, if any, into survivors or recycled tokens.
* `positions`: survivors keep their "original" positions or are "renumbered" without gaps.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from evengaze.errors import ConfigError, ScoreError
from evengaze.layout import VisualTokens

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from evengaze.attention import AttentionStates
    from evengaze.debias import Debias
    from evengaze.engine import Handle
    from evengaze.layout import VisualLayout
    from evengaze.models.base import Adapter
    from evengaze.schedule import Schedule

Mode = Literal["corrected", "official"]
Scope = Literal["prompt", "image", "frame"]
Positions = Literal["original", "renumbered"]
Source = Literal["previous", "own"] | None
"""Whose attention a stage reads; see `Stage`."""


@dataclass(frozen=True)
class Stage:
    """One point at which visual tokens are dropped.

    Attributes:
        layer: 0-based decoder layer; the tokens leave before it runs.
        attention: "previous" reads the attention that layer `layer - 1` paid while it ran; "own" reads the queries and
            keys with which `layer` is about to attend to the tokens that have not been dropped yet; None reads none.
        trims_below: the caches of the layers before `layer`, which have read the whole prompt, forget the dropped
            tokens as well: later tokens do not see them anywhere. Sliding windows, which forget by themselves, stay as
            they are.
    """

    layer: int
    attention: Source = "previous"
    trims_below: bool = False

    @property
    def attended(self) -> int | None:
        """The layer whose attention is read."""
        return None if self.attention is None else self.layer - (self.attention == "previous")


@dataclass(frozen=True)
class Merge:
    """Linear merging: the new state of every target is the weighted sum of its sources.

    Attributes:
        source: (s,) indices of candidates that are added up. A target that shall keep a share of its own state is
            listed among its sources.
        target: (s,) indices of the candidates that receive them; each is in `Selection.keep` or `Selection.recycled`.
        weight: (s,) float weights, used as they are (not normalised).
    """

    source: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Selection:
    """What becomes of the candidates of one row at one stage.

    Attributes:
        keep: (m,) indices of the candidates that survive, ascending.
        merge: how hidden states are combined, or None.
        recycled: (c,) indices of dropped candidates that stand for merged tokens; `merge` says what they hold. Where
            survivors are renumbered they move behind the kept tokens of their picture, in this order; else they stay
            at their own positions. None: no such tokens.
    """

    keep: Tensor
    merge: Merge | None = None
    recycled: Tensor | None = None


@dataclass
class View:
    """One row of the batch at one stage, as a method sees it. n candidates, L tokens in the current sequence.

    Attributes:
        stage: index of the stage among the method's stages.
        tokens: the candidates: the visual tokens that are still there (`tokens.position` indexes the current
            sequence; image, frame, cell, x and padding are those of the original token).
        original: number of visual tokens that the row had at the start.
        hidden: (L, d) hidden states that are about to enter the stage's layer.
        embeddings: (L0, d) states that entered the decoder, before any drop.
        initial: the table of all visual tokens at the start (`initial.position` indexes `embeddings`).
        real: (L,) bool, False for batch padding and fillers.
        sources: whose attention each stage so far reads, this one's last.
        memory: lives as long as the prompt; a method may carry values from stage to stage in it.
        shared: lives as long as the attachment (see `Pruner.prepare`). The engine puts the call's `layout` in it, and
            `prompt`, a number that changes when what the encoders did so far belongs to no later call.
    """

    stage: int
    tokens: VisualTokens
    original: int
    hidden: Tensor
    embeddings: Tensor
    initial: VisualTokens
    real: Tensor
    sources: Sequence[Source]
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    states: AttentionStates | None = None
    row: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def last(self) -> Tensor:
        """(1,) index of the last real token: at prefill the last token of the prompt."""
        return self.real.nonzero()[-1]

    @property
    def text(self) -> Tensor:
        """Indices of the real tokens behind the last visual token: the ones that can attend to all visual tokens.

        The last visual token itself if nothing follows it. Once every visual token behind a piece of text has been
        dropped, later stages find that text here, too; counted from the end, indices stay the same.
        """
        index = torch.arange(len(self.real), device=self.real.device)
        after = index[self.real & (index > self.tokens.position.max())]
        return after if len(after) else self.last

    @property
    def question(self) -> Tensor:
        """(t, d) input embeddings of `text`; only before anything has been dropped."""
        return self.embeddings[self.text.to(self.embeddings.device)]

    @property
    def features(self) -> Tensor:
        """(n, d) hidden states of the candidates."""
        return self.hidden[self.tokens.position]

    def attention(self, queries: Tensor, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """Attention that the candidates receive, averaged over heads.

        Args:
            queries: (r,) indices of the query tokens in the current sequence.
            reduce: over the queries.

        Returns:
            (n,) float32.
        """
        if self.states is None:
            raise ConfigError("this stage reads no attention: set Stage.attention to 'previous' or 'own'")
        return self.states.received(self.row, queries, self.tokens.position, reduce).to(self.hidden.device)


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending. Ties: the lower index wins, on every device."""
    order = torch.sort(score, descending=True, stable=True).indices
    return order[:count].sort().values


def resolve_keep(keep: float, tokens: int) -> int:
    """A budget given as a number of tokens, or as a fraction in (0, 1) of `tokens`, as a number of at least 1."""
    if isinstance(keep, float) and keep <= 1.0:
        return max(1, round(keep * tokens))
    return min(int(keep), tokens)


@dataclass(frozen=True)
class Pruner(ABC):
    """Base class of all methods: a frozen dataclass of its parameters.

    A method implements `stages`, `score` and `budget`; one that merges overrides `choose`. Calling a pruner on a
    model attaches it: `with pruner(model) as run: model.generate(...)`.

    Attributes:
        debias: the two debiasing steps, applied to the language-to-vision ranking.
        mode: "corrected" (default) or "official", the published code's choices, quirks included.
        scope: what a budget is for: all visual tokens of a "prompt" (default), those of each "image" (or video), or
            those of each "frame" (or tile).
    """

    debias: Debias | None = field(default=None, kw_only=True)
    mode: Mode = field(default="corrected", kw_only=True)
    scope: Scope = field(default="prompt", kw_only=True)

    name: ClassVar[str]
    positions: ClassVar[Positions] = "original"

    def __post_init__(self) -> None:
        if self.mode not in ("corrected", "official"):
            raise ConfigError(f"mode must be 'corrected' or 'official', not {self.mode!r}")
        if self.scope not in ("prompt", "image", "frame"):
            raise ConfigError(f"scope must be 'prompt', 'image' or 'frame', not {self.scope!r}")
        for f in fields(self):
            if isinstance(getattr(self, f.name), list):  # as JSON and the command line give them
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))

    # -- what a method says ---------------------------------------------------------------------------------------
    @abstractmethod
    def stages(self, layers: int) -> Sequence[Stage]:
        """The stages, by ascending layer, for a decoder of `layers` layers."""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """(n,) scores of the candidates; larger means keep."""

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

    def prepare(self, model: nn.Module, adapter: Adapter | None, shared: dict[str, Any]) -> Callable[[], None]:
        """Called when the pruner is attached. A method that acts outside the decoder (in a vision tower) hooks it here.

        Args:
            model: the model.
            adapter: its family's adapter; None if the caller gave an explicit layout.
            shared: lives as long as the attachment; `View.shared` is the same dictionary.

        Returns:
            A function that undoes it.
        """
        return lambda: None

    # -- the shared way from scores to a selection ------------------------------------------------------------------
    def select(self, view: View) -> Selection:
        """What the engine calls: a selection for the row, or one for each part of it that has its own budget."""
        if self.scope == "prompt":
            return self._select(view)
        from evengaze.scope import select_parts

        return select_parts(view, self.scope, self._select)

    def _select(self, view: View) -> Selection:
        """All candidates if the budget allows it (the dense model, padding included), else what `choose` says."""
        count = self.budget(view.stage, len(view), view.original)
        if count >= len(view) and self.mode == "corrected":
            return Selection(keep=torch.arange(len(view), device=view.hidden.device))
        return self.choose(view, count)

    def choose(self, view: View, count: int) -> Selection:
        """Keep the best `count` candidates by debiased score."""
        score, allowed = self.ranked(view)
        return Selection(keep=top_allowed(score, allowed, count))

    def ranked(self, view: View) -> tuple[Tensor, Tensor]:
        """Scores after debiasing, and which candidates may be chosen at all.

        Returns:
            (n,) float32 scores and (n,) bool; where padding may not be kept it is False there.
        """
        raw = self.score(view).float()
        if raw.shape != (len(view),):
            raise ScoreError(f"{self.name} scored {tuple(raw.shape)} for {len(view)} visual tokens")
        if bool(raw.isnan().any()):
            raise ScoreError(
                f"{self.name} produced NaN scores at stage {view.stage}. The model's hidden states are probably not "
                "finite: try bfloat16 or float32 instead of float16, or check the inputs."
            )
        view.memory[f"raw{view.stage}"] = raw
        score, allowed = raw, torch.ones_like(raw, dtype=torch.bool)
        *before, now = self.by_text(view.sources)
        earlier = sum(before)
        if self.debias is not None and now and self.debias.applies(earlier):
            score, allowed = self.debiased(self.debias, raw, view)
        elif self.debias is not None and self.mode == "corrected" and earlier:
            allowed = self.debias.valid(view.tokens).to(raw.device)  # padding stays out of later rankings, too
        view.memory[f"score{view.stage}"] = score
        return score, allowed

    def debiased(self, debias: Debias, score: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Apply the debiasing steps; a method overrides this only where its official patch computes them otherwise."""
        features = view.features if debias.sinks is not None else None
        return debias(score, view.tokens, official=self.mode == "official", features=features)

    # -- use ----------------------------------------------------------------------------------------------------
    def __call__(self, model: nn.Module, *, layout: VisualLayout | None = None) -> Handle:
        """Attach to a model; use the result as a context manager, or call its `remove()`."""
        from evengaze import selfcheck
        from evengaze.engine import Handle

        selfcheck.ensure()
        return Handle(model, self, layout)

    def schedule(self, layers: int, visual: int) -> Schedule:
        """Visual tokens entering each layer, for `visual` tokens at the start."""
        from evengaze.schedule import Schedule

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
        return {"method": self.name, **values, "debias": None if self.debias is None else self.debias.to_dict()}


def top_allowed(score: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The `count` best candidates among the allowed ones (fewer if there are fewer), ascending."""
    count = min(count, int(allowed.sum()))
    return top(torch.where(allowed, score, torch.full_like(score, float("-inf"))), count)
