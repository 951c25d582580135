"""What a pruned call kept, merged and dropped, and what that saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evengaze.errors import DataError
from evengaze.files import read_json, write_whole
from evengaze.layout import VisualLayout, VisualTokens
from evengaze.protocol import Merge

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_SCHEMA = 2
"""Version of the files that `Trace.save` writes."""


@dataclass(frozen=True, repr=False)
class RowTrace:
    """One row at one stage. Tokens are indices into the row's layout (0 is the row's first visual token).

    Attributes:
        candidates: (n,) tokens that arrived at the stage.
        kept: (m,) tokens that survived.
        recycled: (c,) tokens that stand for merged ones; None if the method recycles nothing.
        merge: the merge, in candidate indices; None if nothing was merged.
        raw: (n,) scores as the method gave them; None if it gives none.
        scores: (n,) scores after debiasing.
        tokens: (s,) tokens that went on, kept or recycled, in the order of the sequence.
        place: (s,) their indices in the sequence that went on.
    """

    candidates: Tensor
    kept: Tensor
    recycled: Tensor | None = None
    merge: Merge | None = None
    raw: Tensor | None = None
    scores: Tensor | None = None
    tokens: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def empty(cls) -> RowTrace:
        """The trace of a row without images."""
        none = torch.zeros(0, dtype=torch.long)
        return cls(none, none, tokens=none, place=none)

    def __repr__(self) -> str:
        return f"<RowTrace: {self.survivors} of {len(self.candidates)} tokens went on>"

    @property
    def survivors(self) -> int:
        """Visual tokens that went on."""
        return len(self.kept) + (0 if self.recycled is None else len(self.recycled))


@dataclass(frozen=True)
class StageTrace:
    """One stage: the layer before which tokens left, whose attention was read, and one entry for each row."""

    layer: int
    attention: str | None
    rows: Sequence[RowTrace]


@dataclass(frozen=True, repr=False)
class Trace:
    """The record of one prefill.

    Attributes:
        pruner: the method's parameters.
        layout: the visual tokens of every row before pruning.
        length: tokens of the call, batch padding included.
        stages: what happened, by ascending layer.
        entering: for every layer, the length of the sequence that entered it.
        kv_bytes: for every layer, the bytes its cache held after the call; zeros without a cache.
        kv_bytes_unpruned: for every layer, the bytes that it would hold if no token had been dropped, in this call or
            in earlier turns. A static cache holds its whole buffer either way.
    """

    pruner: Mapping[str, Any]
    layout: VisualLayout
    length: int
    stages: Sequence[StageTrace]
    entering: Sequence[int]
    kv_bytes: Sequence[int]
    kv_bytes_unpruned: Sequence[int]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.entering)

    def visual_tokens(self, row: int = 0) -> list[int]:
        """Visual tokens of a row that enter each layer."""
        counts = [len(self.layout.rows[row])] * self.layers
        for stage in self.stages:
            counts[stage.layer :] = [stage.rows[row].survivors] * (self.layers - stage.layer)
        return counts

    def average_tokens(self, row: int = 0) -> float:
        """Mean over layers of the visual tokens that enter them, the measure by which methods are compared."""
        return sum(self.visual_tokens(row)) / self.layers

    def kept(self, row: int = 0, stage: int = -1) -> Tensor:
        """(m,) indices, into the row's visual tokens, of those that survived a stage (the last one by default)."""
        return self.stages[stage].rows[row].kept.cpu()

    # -- from tokens to pictures --------------------------------------------------------------------------------------
    def boxes(
        self,
        picture: int = 0,
        size: Any = None,
        *,
        row: int = 0,
        stage: int = -1,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """What the kept tokens show, in pixels of a picture as the user has it.

        A picture that is shown in several views (a thumbnail and tiles) has boxes of several sizes, which overlap. Of a
        video the boxes are in its frames; `layout.rows[row].frame` says in which.

        Args:
            picture: which picture of the row, counted from 0.
            size: its (width, height) or the picture itself; what the model was told if left out.
            row: batch row.
            stage: which stage.
            tokens: (m,) indices of other visual tokens of the row than the kept ones.

        Returns:
            (m, 4) float64 left, top, right, bottom, in the order of the tokens that belong to the picture.

        Raises:
            DataError: there is no such picture, or its size is not known.
        """
        from evengaze.pixels import patch_boxes, picture_size

        table = self.layout.rows[row]
        return patch_boxes(table, self._of_picture(picture, row, stage, tokens), picture_size(table, picture, size))

    def mask(
        self,
        picture: int = 0,
        size: Any = None,
        *,
        row: int = 0,
        stage: int = -1,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Which pixels of a picture the kept tokens show, by the centres of the pixels; arguments as for `boxes`.

        Returns:
            (height, width) bool; of a video (frames, height, width).
        """
        from evengaze.pixels import is_tiled, patch_boxes, picture_size, views

        table = self.layout.rows[row].to("cpu")
        chosen, (width, height) = self._of_picture(picture, row, stage, tokens), picture_size(table, picture, size)
        view = views(table, picture)[0]
        frames = 1 if is_tiled(table, view) else table.images[view].frames
        shown = torch.zeros(frames, height, width, dtype=torch.bool)
        for box, frame in zip(patch_boxes(table, chosen, (width, height)), table.frame[chosen].tolist(), strict=True):
            left, top, right, bottom = (box - 0.5).ceil().long().tolist()
            shown[frame % frames, top:bottom, left:right] = True
        return shown if frames > 1 else shown[0]

    def columns(self, layer: int, row: int = 0) -> Tensor:
        """Which visual token is behind each column of a layer's attention map, among the call's own tokens.

        With `boxes(tokens=...)` and `layout.rows[row]` that is the patch. Columns of earlier turns stand before them.

        Args:
            layer: 0-based decoder layer.
            row: batch row.

        Returns:
            (M,) indices into the row's visual tokens; -1 for text and padding. M is `entering[layer]`.

        Raises:
            DataError: no such layer or row, or a trace that was written before this was recorded.
        """
        if not 0 <= layer < self.layers or not 0 <= row < len(self.layout.rows):
            raise DataError(f"the trace has {self.layers} layers and {len(self.layout.rows)} rows; not {layer}, {row}")
        place: Tensor | None = self.layout.rows[row].position.cpu()
        tokens: Tensor | None = torch.arange(len(self.layout.rows[row]))
        for stage in self.stages:
            if stage.layer <= layer:
                tokens, place = stage.rows[row].tokens, stage.rows[row].place
        if tokens is None or place is None:
            raise DataError("the trace does not say where tokens stand: it was written by an older evengaze")
        found = torch.full((self.entering[layer],), -1)
        found[place.cpu()] = tokens.cpu()
        return found

    def _of_picture(self, picture: int, row: int, stage: int, tokens: Tensor | None) -> Tensor:
        """(m,) those of the kept (or given) tokens that belong to a picture."""
        from evengaze.pixels import views

        table = self.layout.rows[row]
        chosen = self.kept(row, stage) if tokens is None else tokens.cpu()
        return chosen[torch.isin(table.image.cpu()[chosen], torch.tensor(views(table, picture)))]

    def __repr__(self) -> str:
        return f"<Trace of {self.pruner.get('method', 'a method')}: {self}>"

    def __str__(self) -> str:
        steps = []
        rows = [b for b, r in enumerate(self.layout.rows) if len(r)]
        count = _range([len(self.layout.rows[b]) for b in rows])
        for stage in self.stages:
            after = _range([stage.rows[b].survivors for b in rows])
            steps.append(f"{count} -> {after} at layer {stage.layer}")
            count = after
        average = sum(self.average_tokens(b) for b in rows) / max(1, len(rows))
        text = f"{'; '.join(steps) or 'nothing pruned'}; {average:.1f} average tokens over {self.layers} layers"
        if sum(self.kv_bytes):
            text += f"; KV cache {_megabytes(sum(self.kv_bytes_unpruned))} -> {_megabytes(sum(self.kv_bytes))}"
        return text

    def plot(
        self,
        image: Image | Sequence[Any] | None = None,
        row: int = 0,
        stage: int = 0,
        *,
        picture: int | None = None,
    ) -> Figure:
        """Draw what a stage kept of one row: kept patches bright, dropped dim, padding hatched.

        Where the scores were debiased, the choice without debiasing is shown beside it.

        Args:
            image: the picture as the user has it, one for each frame of a video, or None for the token grid alone. If
                the row has several pictures: all of them, or one and `picture`.
            row: batch row.
            stage: which stage.
            picture: which picture of the row, counted from 0; all of them if left out.

        Raises:
            DataError: there is no such picture, or it is not said which one is given.
        """
        from evengaze.viz.overlay import plot_trace

        return plot_trace(self, image, row=row, stage=stage, picture=picture)

    # -- files --------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "schema": _SCHEMA,
            "pruner": dict(self.pruner),
            "length": self.length,
            "entering": list(self.entering),
            "kv_bytes": list(self.kv_bytes),
            "kv_bytes_unpruned": list(self.kv_bytes_unpruned),
            "layout": [r.to_dict() for r in self.layout.rows],
            "stages": [
                {"layer": s.layer, "attention": s.attention, "rows": [_row_dict(r) for r in s.rows]}
                for s in self.stages
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """Read back what `to_dict` made.

        Raises:
            DataError: another schema, or a field is missing.
        """
        if not isinstance(data, Mapping) or data.get("schema") != _SCHEMA:
            raise DataError(f"not a trace of schema {_SCHEMA} ({str(data)[:40]}...)")
        try:
            rows = tuple(VisualTokens.from_dict(r) for r in data["layout"])
            stages = [StageTrace(s["layer"], s["attention"], [_row_of(r) for r in s["rows"]]) for s in data["stages"]]
            return cls(
                data["pruner"],
                VisualLayout(rows),
                data["length"],
                stages,
                data["entering"],
                data["kv_bytes"],
                data["kv_bytes_unpruned"],
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"malformed trace: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON."""
        write_whole(Path(path), json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            DataError: the file is no trace.
        """
        return cls.from_dict(read_json(Path(path), dict, "Save the trace again."))


def _row_dict(row: RowTrace) -> dict[str, Any]:
    def values(t: Tensor | None) -> list[Any] | None:
        return None if t is None else t.tolist()

    merge = row.merge
    return {
        "candidates": values(row.candidates),
        "kept": values(row.kept),
        "recycled": values(row.recycled),
        "merge": None
        if merge is None
        else [*(t.tolist() for t in (merge.source, merge.target, merge.weight)), _dtype_name(merge.weight)],
        "raw": values(row.raw),
        "scores": values(row.scores),
        "tokens": values(row.tokens),
        "place": values(row.place),
    }


def _row_of(data: Mapping[str, Any]) -> RowTrace:
    def index(values: Sequence[int] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.long)

    def real(values: Sequence[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32)

    merge = data["merge"]
    candidates, kept = index(data["candidates"]), index(data["kept"])
    if candidates is None or kept is None:
        raise ValueError("a row without candidates or kept tokens")
    return RowTrace(
        candidates,
        kept,
        index(data["recycled"]),
        None if merge is None else _merge_of(*merge),
        real(data["raw"]),
        real(data["scores"]),
        index(data.get("tokens")),
        index(data.get("place")),
    )


def _merge_of(source: list[int], target: list[int], weight: list[float], dtype: str = "float32") -> Merge:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype!r} is no type of weights")
    return Merge(torch.tensor(source).long(), torch.tensor(target).long(), torch.tensor(weight, dtype=kind))


def _dtype_name(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "0"
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB" if size >= 2**18 else f"{size / 2**10:.1f} kB"
