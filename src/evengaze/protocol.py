"""The protocol of a pruning method.

A method never sees a cache or a mask. It says at which decoder layers it acts (`stages`), gives every visual token a
score (`score`), and, if it does more than keep the best, what becomes of the rest (`choose`). The engine
(`evengaze.engine`) calls it for rows of the batch that have the same number of visual tokens, all of them at once, and
owns everything else. Five concepts:

* `Stage`: before which layer, whose attention is read ("previous": the layer that has just run; "own": the layer about
  to run; None: no attention), and whether the layers below forget the dropped tokens, too.
* `View`: some rows at one stage: the surviving visual tokens, hidden states, attention received from chosen queries.
* `score`: (rows, n) float32, larger means keep. Debiasing is applied to it once, for all methods.
* `Selection`: which tokens survive (`choose`), and the linear merges, if any, into survivors or recycled tokens.
* `positions`: survivors keep their "original" positions or are "renumbered" without gaps.

Nothing here asks a device for values: how many tokens there are is known on the host, which ones is known where they
are. A method that thinks in single rows asks for them: `view.split()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from evengaze.candidates import Candidates
from evengaze.device import Rows, counting, device_rows, upload
from evengaze.errors import ConfigError
from evengaze.layout import VisualLayout
from evengaze.memory import Memory, Shared, Store
from evengaze.parameters import coerce

Mode = Literal["corrected", "official"]
Scope = Literal["prompt", "image", "frame"]
Positions = Literal["original", "renumbered"]
Source = Literal["previous", "own"] | None
"""Whose attention a stage reads; see `Stage`."""
SOURCES = ("previous", "own")

_ELEMENTS = 1 << 24
"""Weights held at once while states are merged."""


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
    """Linear merging: the new state of every target is the weighted sum of its sources. All tensors (rows, s).

    Attributes:
        source: indices of candidates that are added up. A target that shall keep a share of its own state is listed
            among its sources.
        target: indices of the candidates that receive them; each is in `Selection.keep` or `Selection.recycled`.
        weight: float weights, used as they are (not normalised).
    """

    source: Tensor
    target: Tensor
    weight: Tensor

    def row(self, row: int) -> Merge:
        """What happens in one row; all tensors (s,)."""
        return Merge(self.source[row], self.target[row], self.weight[row])


@dataclass(frozen=True)
class Selection:
    """What becomes of the candidates of some rows at one stage.

    Attributes:
        keep: (rows, m) indices of the candidates that survive, ascending.
        merge: how hidden states are combined, or None.
        recycled: (rows, c) indices of dropped candidates that stand for merged tokens; `merge` says what they hold.
            Where survivors are renumbered they move behind the kept tokens of their picture, in this order; else they
            stay at their own positions. None: no such tokens.
        raw: (rows, n) scores as the method gave them; None if it gave none.
        scores: (rows, n) scores after debiasing.
        rows: which of the view's rows it is for; None: all.
        pending: a check of the scores whose outcome is not known yet.
    """

    keep: Tensor
    merge: Merge | None = None
    recycled: Tensor | None = None
    raw: Tensor | None = None
    scores: Tensor | None = None
    rows: tuple[int, ...] | None = None
    pending: Pending | None = None

    @classmethod
    def everything(cls, view: View) -> Selection:
        """Keep all candidates."""
        index = torch.arange(len(view), device=view.hidden.device)
        return cls(index.expand(len(view.rows), -1))

    @property
    def survivors(self) -> int:
        """Tokens that go on, in each row."""
        return self.keep.shape[1] + (0 if self.recycled is None else self.recycled.shape[1])


class Pending:
    """A value that a device is still computing and the host wants to look at later.

    Args:
        value: one number.
        complain: raises if the number, once it is known, is not as it should be.
    """

    def __init__(self, value: Tensor, complain: Callable[[float], None]) -> None:
        self._complain = complain
        self._event: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(value.device))
        else:
            self._host = torch.empty((), dtype=value.dtype).copy_(value, non_blocking=value.device.type == "cpu")

    @property
    def known(self) -> bool:
        """Whether looking does not mean waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Look, and wait for it if need be."""
        if self._event is not None:
            self._event.synchronize()
        self._complain(float(self._host))


@dataclass(frozen=True)
class Picked:
    """Tokens of the current sequence, in several rows.

    Attributes:
        index: (rows, r) where they are.
        real: (rows, r) bool, False for entries that only fill up rows with fewer; None if there are none.
        run: in every row they stand there and right behind it; None where that is not so, or only the device knows.
    """

    index: Tensor
    real: Tensor | None = None
    run: int | None = None

    @property
    def here(self) -> slice | None:
        """The same as a slice of the sequence, if it is one."""
        return None if self.run is None else slice(self.run, self.run + self.index.shape[1])

    def to(self, device: torch.device) -> Picked:
        """The same on another device."""
        if self.index.device == device:
            return self
        return Picked(upload(self.index, device), None if self.real is None else self.real.to(device), self.run)

    def split(self, count: int) -> Iterator[Picked]:
        """Parts of at most `count` tokens a row."""
        for start in range(0, self.index.shape[1], count):
            part, run = slice(start, start + count), None if self.run is None else self.run + start
            yield Picked(self.index[:, part], None if self.real is None else self.real[:, part], run)

    def select(self, rows: Rows) -> Picked:
        """The same of some rows."""
        return Picked(self.index[rows], None if self.real is None else self.real[rows], self.run)


class Words:
    """Where in the current sequence the text is that asks about the pictures; found out when it is asked for.

    Args:
        last: gives the (rows, 1) indices of the last token of each row's prompt.
        text: gives the prompt's tokens behind each row's last visual token.
        end: where all of these last tokens stand; None where they do not stand at one place.
    """

    def __init__(self, last: Callable[[], Tensor], text: Callable[[], Picked], end: int | None = None) -> None:
        self._last, self._text, self.end = last, text, end

    @cached_property
    def last(self) -> Tensor:
        """(rows, 1) index of the last token of each row's prompt."""
        return self._last()

    @cached_property
    def text(self) -> Picked:
        """The prompt's tokens behind each row's last visual token."""
        return self._text()

    def end_of(self, index: Tensor) -> int | None:
        """`end`, if an index is `last`."""
        return self.end if self.__dict__.get("last") is index else None

    def select(self, rows: Rows) -> Words:
        """The same of some rows."""
        return Words(lambda: self.last[rows], lambda: self.text.select(rows), self.end)

    @classmethod
    def among(cls, real: Tensor, position: Tensor) -> Words:
        """From which tokens are real, (rows, L) bool, and where visual ones are, (rows, n)."""
        place = torch.arange(real.shape[1], device=real.device).expand_as(real)

        def last() -> Tensor:
            return torch.where(real, place, -1).amax(1, keepdim=True)

        def text() -> Picked:
            behind = real & (place > position.amax(1, keepdim=True))
            none = ~behind.any(1, keepdim=True)
            return Picked(place, behind | (none & (place == last())))

        return cls(last, text)


class Attention(Protocol):
    """Attention that one call of a layer paid in some rows."""

    def received(self, queries: Picked, columns: Picked, reduce: Literal["mean", "sum"]) -> Tensor:
        """(rows, n) attention that the tokens `columns` receive from `queries`, over heads."""

    def select(self, rows: Rows) -> Attention:
        """The same of some rows."""


@dataclass
class View:
    """Some rows of the batch at one stage, as a method sees them: all have n candidates; L tokens a row.

    Attributes:
        stage: index of the stage among the method's stages.
        tokens: the candidates: the visual tokens that are still there, all columns (rows, n).
        original: number of visual tokens that each row had at the start.
        pinned: 1 if the prompt ends in the picture: its last token, whose logits are read, is no candidate and stays,
            as one of those that a budget is for; else 0.
        hidden: (rows, L, d) hidden states that are about to enter the stage's layer.
        embeddings: (rows, L0, d) states that entered the decoder, before any drop.
        words: where the text is.
        sources: whose attention each stage so far reads, this one's last.
        rows: numbers of the rows in the batch.
        states: the attention that the stage reads.
        memory: lives as long as the prompt; a method may carry values from stage to stage in it.
        whole: where the candidates are only one picture's: all visual tokens of the rows at the start.
        layout: the visual tokens of all rows of the batch, on the host.
        notes: what methods noted while the call's pictures were encoded.
        shared: what `Pruner.prepare` was given; the same for all calls of the attachment, in all threads.
    """

    stage: int
    tokens: Candidates
    original: int
    hidden: Tensor
    embeddings: Tensor
    words: Words
    sources: Sequence[Source]
    rows: tuple[int, ...] = (0,)
    pinned: int = 0
    states: Attention | None = None
    memory: Memory = field(default_factory=Memory)
    whole: Candidates | None = None
    layout: VisualLayout = field(default_factory=lambda: VisualLayout(()))
    notes: Store = field(default_factory=Store)
    shared: Shared = field(default_factory=Shared)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def initial(self) -> Candidates:
        """All visual tokens at the start; `initial.position` indexes `embeddings`."""
        if self.whole is not None:
            return self.whole
        start = self.tokens.start
        return Candidates(start.column("position"), start)

    @property
    def last(self) -> Tensor:
        """(rows, 1) index of the last token of the prompt, whose logits decide the answer."""
        return self.words.last

    @property
    def text(self) -> Picked:
        """The prompt's tokens behind the last visual token: the ones that can attend to all visual tokens.

        Where prompt and answer are one call, no token of the answer is among them. The last visual token itself if
        nothing follows it. Once every visual token behind a piece of text has been dropped, later stages find that text
        here, too; counted from the end, indices stay the same.
        """
        return self.words.text

    @property
    def question(self) -> Tensor:
        """(rows, t, d) input embeddings of `text`, 0 for its fillers; only before anything has been dropped."""
        text = self.text.to(self.embeddings.device)
        states = take_states(self.embeddings, text.index)
        return states if text.real is None else states * text.real[..., None].to(states)

    @property
    def features(self) -> Tensor:
        """(rows, n, d) hidden states of the candidates."""
        return take_states(self.hidden, self.tokens.position)

    def attention(self, queries: Tensor | Picked, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """Attention that the candidates receive, averaged over heads.

        Args:
            queries: the query tokens: (rows, r) indices in the current sequence, or `text`.
            reduce: over the queries.

        Returns:
            (rows, n) float32.
        """
        if self.states is None:
            raise ConfigError("this stage reads no attention: set Stage.attention to 'previous' or 'own'")
        tokens = self.tokens
        if not isinstance(queries, Picked):
            queries = Picked(queries, run=tokens.run if queries is tokens.position else self.words.end_of(queries))
        columns = Picked(tokens.position, run=tokens.run)
        return self.states.received(queries, columns, reduce).to(self.hidden.device)

    def select(self, rows: Sequence[int]) -> View:
        """Some of the rows, counted within this view."""
        if len(rows) == len(self.rows):
            return self
        at = device_rows(rows, self.hidden.device)
        return replace(
            self,
            tokens=self.tokens.select(rows),
            hidden=self.hidden[at],
            embeddings=self.embeddings[device_rows(rows, self.embeddings.device)],
            words=self.words.select(at),
            rows=tuple(self.rows[b] for b in rows),
            states=None if self.states is None else self.states.select(at),
            memory=self.memory.select(rows, self.hidden.device),
            whole=None if self.whole is None else self.whole.select(rows),
        )

    def split(self) -> Iterator[View]:
        """One view for each row."""
        return (self.select([b]) for b in range(len(self.rows)))


def take_states(states: Tensor, index: Tensor) -> Tensor:
    """(rows, m, d) of (rows, L, d), at (rows, m) indices."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))


def merge_states(states: Tensor, out: Tensor, merge: Merge, offset: int = 0) -> None:
    """Write merged states over those of their targets.

    Sums are products with a matrix of weights: adding up in place would add in another order each time on a GPU.

    Args:
        states: (rows, L, d) the states that are added up.
        out: (rows, L, d) where the sums are written; may be `states`.
        merge: indices into the L states.
        offset: added to the indices.
    """
    target, source = merge.target, merge.source
    if offset:
        target, source = target + offset, source + offset
    parts, weight = take_states(states, source).float(), merge.weight.float()[:, None]
    sums, first = [], []
    for some in torch.split(target, max(1, _ELEMENTS // max(1, target.numel())), 1):
        same = some[:, :, None] == target[:, None]
        sums.append(torch.where(same, weight, 0.0) @ parts)
        first.append(same.int().argmax(2))
    slot = _cat(first)
    whole = take_states(_cat(sums), slot).to(out.dtype)
    # All parts of a target are given its sum, so that writing it several times does no harm; gradients go to the first.
    if whole.requires_grad:
        here = slot == counting(slot.shape[1], slot.device)
        whole = torch.where(here[..., None], whole, whole.detach())
    out.scatter_(1, target[..., None].expand_as(whole), whole)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores along the last axis, ascending. Ties: the lower index wins, everywhere."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values


def resolve_keep(keep: float, tokens: int) -> int:
    """A budget given as a number of tokens, or as a fraction in (0, 1] of `tokens`, as a number of at least 1."""
    if isinstance(keep, float) and keep <= 1.0:
        return max(1, round(keep * tokens))
    return min(int(keep), tokens)


def top_allowed(score: Tensor, allowed: Tensor | None, count: int) -> Tensor:
    """The `count` best candidates among the allowed ones, ascending; at least so many must be allowed in each row."""
    return top(score if allowed is None else score.masked_fill(~allowed, float("-inf")), count)


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

    def select(self, view: View) -> Selection | Sequence[Selection]:
        """What becomes of the candidates of some rows at one stage.

        Rows that keep different numbers of tokens get selections of their own, which say for which rows they are.
        """

    def prepare(self, model: nn.Module, adapter: Any, shared: Shared) -> Callable[[], None]:
        """Called when it is attached; returns what undoes it."""

    def to_dict(self) -> dict[str, Any]:
        """Its parameters as JSON-able values."""
