"""Where the question ends: which text ranks which visual tokens of a call.

A prompt's visual tokens are ranked by the text behind them, its last token first of all, the one whose logits decide
the answer. In `generate` the call ends where the prompt does. Elsewhere prompt and answer are one call, or several
samples are one row, and something has to say where each prompt ends, best first:

* the caller: `pruner(model, question=...)`, which may say that the first of `logits_to_keep` does;
* `labels`: a prompt ends in front of the first token that is to be predicted, in each turn of a conversation;
* candidates of a draft in `generate` stand behind the prompt;
* packed rows: `position_ids` that start again, without a mask, or `cu_seq_lens_q` say where samples end;
* the row's last real token.

All of it is worked out on the host, and only for calls in which there is something to work out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

from evengaze.errors import ConfigError, LayoutError
from evengaze.layout import VisualLayout, VisualTokens

Ends = int | Sequence[int] | Tensor
"""Where the prompt ends: its number of tokens in every row or in each, or a (B, L) bool mask of the question."""
Said = Ends | Callable[[Tensor | None], Ends | None] | Literal["logits_to_keep"] | None
"""What a caller may say: that, a function of the (B, L) token ids that says it for each call, or "logits_to_keep": the
first token whose logits are asked for ends the prompt."""


LOGITS: Final = "logits_to_keep"


@dataclass(frozen=True)
class Question:
    """What ranks some of a row's visual tokens. Indices are into the call's tokens, on the host.

    Attributes:
        start: the first of the row's visual tokens that it is for.
        stop: the first behind them.
        text: (t,) real tokens that are no visual ones, behind the first of the visual tokens, up to the query. Those
            behind the last one can attend to all of them.
        query: the prompt's last token. It is never dropped, even if it is a visual token itself.
        pinned: whether it is one.
    """

    start: int
    stop: int
    text: Tensor
    query: int
    pinned: bool


Questions = tuple[tuple[Question, ...], ...]
"""Those of each row, in the order of the visual tokens; none in rows without visual tokens."""


@dataclass(frozen=True)
class Clues:
    """What a call brings along that says where prompts end. Tensors may be on any device.

    Attributes:
        answers: (B, L) bool, True for tokens that are labelled.
        read: index of the first token whose logits are read.
        samples: (B, L) number of the sample that each token of a packed row belongs to.
        said: where the caller says that they end.
    """

    answers: Tensor | None = None
    read: int | None = None
    samples: Tensor | None = None
    said: Ends | None = None

    def samples_of(self, states: Tensor) -> Tensor | None:
        """(B, L) `samples` beside (B, L, d) states."""
        return None if self.samples is None else self.samples.to(states.device).expand(states.shape[0], -1).contiguous()

    @property
    def any(self) -> bool:
        """Whether there is anything to work out."""
        return not (self.answers is None and self.read is None and self.samples is None and self.said is None)


def check_said(said: Any) -> None:
    """Raise a ConfigError unless `question` is of a kind that is understood."""
    if said is None or callable(said) or _number(said) or (isinstance(said, str) and said == LOGITS):
        return
    if isinstance(said, Tensor):
        if said.dim() == 2 if said.dtype == torch.bool else said.dim() <= 1 and not said.is_floating_point():
            return
    elif isinstance(said, Sequence) and not isinstance(said, str) and all(map(_number, said)):
        return
    raise ConfigError(
        "question must be the number of tokens of the prompt (of all rows, or one for each), a (B, L) bool mask of the "
        f"tokens that ask, a function of the token ids that gives either, or {LOGITS!r}, not {said!r:.200}"
    )


def _number(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class Forward(Protocol):
    """What a model's forward was called with; `engine.call.Call` is it."""

    labels: Tensor | None
    ignored: int
    keep: Any

    def drafted(self, length: int) -> int:
        """How many of `length` tokens are a draft's, behind the prompt."""


def said_of(said: Said, ids: Tensor | None, past: int) -> Ends | Literal["logits_to_keep"] | None:
    """What the caller says of a call with (B, L) token ids behind `past` others; numbers and masks are for prompts.

    Raises:
        ConfigError: the caller's function says something that is not understood.
    """
    if isinstance(said, str):
        return said
    if not callable(said):
        return None if past else said
    found = said(ids)
    if callable(found):
        raise ConfigError("question: the function has to give a number of tokens for each row, or a (B, L) bool mask")
    check_said(found)
    return found


def clues(
    arguments: Mapping[str, Any],
    forward: Forward,
    *,
    length: int,
    masked: bool,
    past: int,
    said: Ends | Literal["logits_to_keep"] | None,
) -> Clues:
    """What a call says about its prompts.

    Args:
        arguments: of the decoder.
        forward: of the model.
        length: L.
        masked: whether the call has an attention mask, which decides what is seen instead of packed positions.
        past: number of tokens in the cache.
        said: what the caller says.
    """
    samples = None if masked or past else _samples(arguments, length)
    labels, drafted = forward.labels, forward.drafted(length)
    if drafted:
        return Clues(read=length - drafted - 1, samples=samples)
    if isinstance(said, str):
        return Clues(read=_first_read(forward.keep, length), samples=samples)
    if said is not None:
        return Clues(samples=samples, said=said)
    answers = None if labels is None or labels.shape[1] != length else labels != forward.ignored
    return Clues(answers=answers, samples=samples)


def _first_read(keep: Any, length: int) -> int | None:
    """The first token whose logits are read, if not all are or the last one only."""
    if isinstance(keep, Tensor) and keep.dim() == 1 and len(keep):
        first = int(keep.min()) % length
    elif _number(keep):
        first = length - int(keep)
    else:
        return None
    return first if 0 < first < length - 1 else None


def _samples(arguments: Mapping[str, Any], length: int) -> Tensor | None:
    """(B or 1, L) sample numbers of packed rows; None if every row is one sample."""
    lengths = arguments.get("cu_seq_lens_q")
    if isinstance(lengths, Tensor) and lengths.dim() == 1 and len(lengths) > 2:
        edges = lengths.cpu().long()
        return torch.searchsorted(edges[1:].contiguous(), torch.arange(length), right=True)[None]
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor):
        return None
    if positions.dim() == 3:  # axes of multimodal rotary embeddings; the first of four counts tokens
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    if positions.dim() != 2 or positions.shape[1] != length or length < 2:
        return None
    jumps = positions.cpu().diff(dim=1) != 1
    if not bool(jumps.any()):
        return None
    return torch.nn.functional.pad(jumps.long().cumsum(1), (1, 0))


def questions(layout: VisualLayout, real: Tensor | None, length: int, known: Clues) -> Questions | None:
    """Who ranks what.

    Args:
        layout: on the host, one table a row.
        real: (B, L) bool on the host, False for batch padding; None without padding.
        length: L.
        known: what the call says.

    Returns:
        None if every row is one prompt that ends with the row, in text.

    Raises:
        LayoutError: the caller's question does not fit the call, or visual tokens stand behind it.
    """
    batch = len(layout)
    if not known.any and not _ends_in_picture(layout, real, length):
        return None
    everywhere = torch.ones(length, dtype=torch.bool)
    answers, samples = _host(known.answers, batch), _host(known.samples, batch)
    said = None if known.said is None else _said(known.said, batch, length)
    found: list[tuple[Question, ...]] = []
    for b, table in enumerate(layout.rows):
        here = everywhere if real is None else real[b]
        sample = torch.zeros(length, dtype=torch.long) if samples is None else samples[b]
        if not len(table):
            found.append(())
        elif said is not None:
            found.append(_asked(table, here, sample, _said_ends(said[b], table, here, sample), said[b], b))
        else:
            ends = _sample_ends(here, sample)
            if answers is not None:
                ends |= _answer_ends(answers[b] & here, table, here, sample)
            if known.read is not None:
                ends[here[: known.read + 1].nonzero()[-1:, 0]] = True
            found.append(_asked(table, here, sample, ends, None, b))
    return tuple(found)


def answered_in(asked: Questions, real: Tensor | None, known: Clues, length: int) -> bool:
    """Whether a call holds tokens behind a prompt that belong to the same sample: its answer, or a later turn."""
    samples = _host(known.samples, len(asked))
    for b, row in enumerate(asked):
        order = torch.arange(length) if real is None else real[b].nonzero()[:, 0]
        for question in row:
            later = order[order > question.query][:1]
            if len(later) and (samples is None or bool(samples[b, later] == samples[b, question.query])):
                return True
    return False


def _ends_in_picture(layout: VisualLayout, real: Tensor | None, length: int) -> bool:
    for b, table in enumerate(layout.rows):
        if len(table):
            last = length - 1 if real is None else int(real[b].nonzero()[-1])
            if table.span[1] - 1 == last:
                return True
    return False


def _host(value: Tensor | None, batch: int) -> Tensor | None:
    return None if value is None else value.cpu().expand(batch, -1)


def _said(said: Ends, batch: int, length: int) -> list[Tensor]:
    """For each row a number of tokens () or a mask (L,)."""
    given = torch.as_tensor(said).cpu()
    if given.dim() == 0:
        given = given.expand(batch)
    if given.shape[0] == 0 or batch % given.shape[0]:
        raise LayoutError(f"question has {given.shape[0]} rows, the call has {batch}; give one entry for each row")
    given = given.repeat_interleave(batch // given.shape[0], 0)
    if given.dim() == 2 and given.shape[1] != length:
        raise LayoutError(f"question has {given.shape[1]} tokens a row, the call has {length}")
    if given.dim() == 1 and not 0 < int(given.min()) <= int(given.max()) <= length:
        raise LayoutError(f"question={given.tolist()}: prompts of a call of {length} tokens have 1 to {length} tokens")
    return list(given)


def _said_ends(said: Tensor, table: VisualTokens, real: Tensor, sample: Tensor) -> Tensor:
    """(L,) bool: the last token of each stretch of the question, but for those inside of pictures."""
    if said.dim() == 0:
        asks = real.clone()
        asks[int(said) :] = False
        return _sample_ends(asks, torch.zeros_like(sample))
    asks = said & real
    order = real.nonzero()[:, 0]
    there, number = asks[order], sample[order]
    visual = torch.zeros_like(real).index_fill(0, table.position, True)[order]
    goes_on = (there[1:] | (visual[1:] & visual[:-1])) & (number[1:] == number[:-1])
    follows = torch.nn.functional.pad(goes_on, (0, 1))
    return torch.zeros_like(real).index_put((order[there & ~follows],), torch.tensor(True))


def _sample_ends(real: Tensor, sample: Tensor) -> Tensor:
    """(L,) bool: the last real token of each sample."""
    order = real.nonzero()[:, 0]
    last = torch.nn.functional.pad(sample[order].diff() != 0, (0, 1), value=True)
    return torch.zeros_like(real).index_put((order[last[: len(order)]],), torch.tensor(True))


def _answer_ends(answers: Tensor, table: VisualTokens, real: Tensor, sample: Tensor) -> Tensor:
    """(L,) bool: the tokens in front of each stretch of labels."""
    answers = answers.index_fill(0, table.position, False)  # a picture is no answer, whatever its labels are
    order = real.nonzero()[:, 0]
    there, number = answers[order], sample[order]
    begins = there[1:] & ~there[:-1] & (number[1:] == number[:-1])
    return torch.zeros_like(real).index_put((order[:-1][begins],), torch.tensor(True))


def _asked(
    table: VisualTokens, real: Tensor, sample: Tensor, ends: Tensor, said: Tensor | None, row: int
) -> tuple[Question, ...]:
    """Every visual token is ranked by the prompt that ends next behind it."""
    stops, position = ends.nonzero()[:, 0], table.position
    number = torch.searchsorted(stops, position)
    behind = number < len(stops)
    if bool(behind.all()):
        behind = sample[stops[number]] == sample[position]
    if not bool(behind.all()):
        token = int(position[~behind][0])
        last = f"ends at token {int(stops[-1])}" if len(stops) else "has no token"
        raise LayoutError(
            f"row {row}: the question {last}, and visual token {token} stands behind it, where nothing asks about it. "
            "A question has to end behind its pictures."
        )
    words = real.index_fill(0, position, False)
    if said is not None and said.dim() == 1:
        words &= said
    place, found, start = torch.arange(len(real)), [], 0
    for k, count in zip(*(t.tolist() for t in torch.unique_consecutive(number, return_counts=True)), strict=True):
        first, query, stop = int(position[start]), int(stops[k]), start + count
        text = words & (place > first) & (place <= query) & (sample == sample[query])
        found.append(Question(start, stop, text.nonzero()[:, 0], query, query == int(position[stop - 1])))
        start = stop
    return tuple(found)
