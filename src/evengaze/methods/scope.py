"""Budgets of their own for every picture or frame of a prompt, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from evengaze.layout import VisualTokens
from evengaze.protocol import Merge, Selection, View


@dataclass
class Part(View):
    """The candidates of one picture or frame. What is text is decided by the whole row."""

    whole: View | None = None

    @property
    def text(self) -> Tensor:
        """The whole row's text."""
        assert self.whole is not None
        return self.whole.text


def select_parts(view: View, scope: Literal["image", "frame"], select: Callable[[View], Selection]) -> Selection:
    """Let a method select from each part of a row as if the others' visual tokens were no candidates.

    Args:
        view: the row.
        scope: what a part is: all views of a picture, a whole video, or one frame (or tile) of either.
        select: the method's selection.

    Returns:
        One selection for the row. Scores of the parts are put together in `view.memory`; where a part was kept whole,
        so that nothing was scored, they are left out.
    """
    now, start = _parts(view.tokens, scope), _parts(view.initial, scope)
    memories = view.memory.setdefault("parts", {})
    keep: list[Tensor] = []
    recycled: list[Tensor] = []
    merges: list[Merge] = []
    names = (f"raw{view.stage}", f"score{view.stage}")
    scores: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in torch.unique(now).tolist():
        index = (now == part).nonzero().flatten()
        own = memories.setdefault(part, {})
        own.update({k: v for k, v in view.memory.items() if k != "parts"})
        values = {f.name: getattr(view, f.name) for f in fields(View)}
        values.update(tokens=view.tokens.take(index), original=int((start == part).sum()), memory=own)
        chosen = select(Part(**values, whole=view))
        keep.append(index[chosen.keep])
        if chosen.recycled is not None:
            recycled.append(index[chosen.recycled])
        if chosen.merge is not None:
            merges.append(Merge(index[chosen.merge.source], index[chosen.merge.target], chosen.merge.weight))
        for name in names:
            if name in own:
                scores[name].append(own.pop(name))
    order = torch.argsort(now, stable=True)
    for name, values_of in scores.items():
        if sum(map(len, values_of)) == len(view):
            view.memory[name] = torch.empty_like(torch.cat(values_of)).index_copy_(0, order, torch.cat(values_of))
    return Selection(
        keep=torch.cat(keep).sort().values,
        merge=_joined(merges) if merges else None,
        recycled=torch.cat(recycled) if recycled else None,
    )


def _joined(merges: list[Merge]) -> Merge:
    return Merge(
        torch.cat([m.source for m in merges]),
        torch.cat([m.target for m in merges]),
        torch.cat([m.weight for m in merges]),
    )


def _parts(tokens: VisualTokens, scope: Literal["image", "frame"]) -> Tensor:
    """(n,) number of the part that each token belongs to, in sequence order."""
    picture = torch.tensor([image.part == 0 for image in tokens.images]).cumsum(0).to(tokens.image.device)
    part = picture[tokens.image]
    if scope == "frame" and len(tokens):
        # Views of a picture are frames of their own.
        frames = max(image.frames for image in tokens.images)
        part = tokens.image * frames + tokens.frame
    return part
