"""The protocol of a pruning method.

A method never sees a batch, a cache or a mask. It says at which decoder layers it acts (`stages`), gives every visual
token of *one* prompt a score (`score`), and, if it does more than keep the best, what becomes of the rest (`choose`).
The engine (`evengaze.engine.session`) calls it row by row and owns everything else. Five concepts:

* `Stage`: before which layer, whose attention is read ("previous": the layer that has just run; "own": the layer about
  to run; None: no attention), and whether the layers below forget the dropped tokens, too.
* `View`: one row at one stage: the surviving visual tokens, hidden states, attention received from chosen queries.
* `score`: (n,) float32, larger means keep. Debiasing is applied to it here, once, for all methods.
* `Selection`: which tokens survive (`choose`), and the linear merges, if any, into survivors or recycled tokens.
* `positions`: survivors keep their "original" positions or are "renumbered" without gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from evengaze.errors import ConfigError
from evengaze.layout import VisualTokens
from evengaze.parameters import coerce

Mode = Literal["corrected", "official"]
Scope = Literal["prompt", "image", "frame"]
Positions = Literal["original", "renumbered"]
Source = Literal["previous", "own"] | None
"""Whose attention a stage reads; see `Stage`."""
SOURCES = ("previous", "own")


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

    def __post_init__(self) -> None:
        coerce(self)

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


class Attention(Protocol):
    """Attention that one call of a layer paid."""

    def received(self, row: int, queries: Tensor, columns: Tensor, reduce: Literal["mean", "sum"]) -> Tensor:
        """(n,) attention that the tokens `columns` receive from the tokens `queries` of a batch row, over heads."""


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
        shared: the attachment's dictionary (see `Pruner.prepare`), copied for the call, with the call's `layout` and
            with what was noted in `shared["notes"]()` while its pictures were encoded.
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
    states: Attention | None = None
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


def top_allowed(score: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The `count` best candidates among the allowed ones (fewer if there are fewer), ascending."""
    count = min(count, int(allowed.sum()))
    return top(torch.where(allowed, score, torch.full_like(score, float("-inf"))), count)


class Method(Protocol):
    """What the engine asks of a pruning method. `evengaze.methods.Pruner` is the base class that answers it."""

    @property
    def name(self) -> str:
        """What files and the command line call it."""

    @property
    def positions(self) -> Positions:
        """Which positions survivors have."""

    def stages(self, layers: int) -> Sequence[Stage]:
        """Where it drops tokens, by ascending layer, in a decoder of `layers` layers."""

    def select(self, view: View) -> Selection:
        """What becomes of the candidates of one row at one stage."""

    def prepare(self, model: nn.Module, adapter: Any, shared: dict[str, Any]) -> Callable[[], None]:
        """Called when it is attached; returns what undoes it."""

    def to_dict(self) -> dict[str, Any]:
        """Its parameters as JSON-able values."""
