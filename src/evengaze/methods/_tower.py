"""What methods do inside a vision tower: read its attention, or let patches leave it.

The decoder's side of it is a stage before layer 0. A shortened tower puts its survivors back at their places in the
full grid, so that neither the projector nor the prompt's placeholders notice; the same tokens then leave the decoder
before its first layer, where `Patches.of` tells a method what the tower decided.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evengaze.device import upload
from evengaze.engine.attention import AttentionStates, attention_module
from evengaze.engine.intercept import before_forward, behind_forward
from evengaze.engine.tap import Taps
from evengaze.errors import ConfigError, LayoutError, UnsupportedModelError
from evengaze.memory import Shared, Store
from evengaze.models.base import Adapter, VisionTower
from evengaze.protocol import Picked, Selection, View, merge_states

Choose = Callable[[Tensor], Selection]
"""From the (images, n) scores of current patches to what becomes of them."""


class _Seen:
    """What the tower's calls for one prompt gave: (pictures, patches) values, and how many patches went on."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.left = 0

    def __add__(self, later: _Seen) -> _Seen:
        """Of a prompt whose pictures were encoded in several calls."""
        both = _Seen()
        both.values, both.left = [*self.values, *later.values], later.left
        return both


class Patches:
    """One value for every patch that the tower saw, from the tower's calls to the prefill that uses them.

    Args:
        notes: gives the store of the running call.
    """

    def __init__(self, notes: Callable[[], Store]) -> None:
        self._notes = notes

    def add(self, values: Tensor, left: int | None = None) -> None:
        """Values of one call of the tower, (pictures, patches), and how many patches of each picture went on."""
        notes = self._notes()
        seen = notes.get(_Seen) or _Seen()
        seen.values.append(values)
        seen.left = values.shape[1] if left is None else left
        notes.put(seen)

    @staticmethod
    def left(view: View) -> tuple[int, int]:
        """How many of a picture's patches went on, and how many there were."""
        seen = _seen(view)
        return seen.left, seen.values[0].shape[1]

    @staticmethod
    def of(view: View) -> Tensor:
        """(rows, n) values of the candidates.

        Raises:
            LayoutError: the tower did not run for this prompt, or its patches are not the rows' visual tokens.
        """
        values = torch.cat(_seen(view).values).to(view.hidden.device)
        # A picture is an image or a frame. With beams the rows are repeated, but each picture was encoded once.
        pictures = [[i.frames for i in row.images] for row in view.layout.rows]
        total = sum(map(sum, pictures))
        repeats, rest = divmod(total, len(values))
        if rest or repeats == 0:
            raise LayoutError(f"the vision tower encoded {len(values)} pictures, the prompts hold {total}")
        if any(i.cells != values.shape[1] for images in view.tokens.images for i in images):
            raise LayoutError(f"the vision tower has {values.shape[1]} patches, an image of the prompt another number")
        index = []
        for row, table in zip(view.rows, view.tokens.start.tables, strict=True):
            before = sum(map(sum, pictures[::repeats][: row // repeats]))
            starts = torch.tensor([before, *pictures[row]]).cumsum(0)
            index.append((starts[table.image] + table.frame) * values.shape[1] + table.cell)
        return values.flatten()[view.tokens.of_start(upload(torch.stack(index), values.device))]


def _seen(view: View) -> _Seen:
    seen = view.notes.get(_Seen)
    if seen is None:
        raise LayoutError("the vision tower did not run for these images; pass pixels, not image embeddings")
    return seen


def towers(model: nn.Module, adapter: Adapter | None) -> list[VisionTower]:
    """The model's towers: one, or one for images and one for videos.

    Raises:
        UnsupportedModelError: only a decoder is there, or patches are not visual tokens one to one.
    """
    if adapter is None:
        raise UnsupportedModelError(
            "this method works in the vision tower: attach it to the whole vision-language model, without a layout"
        )
    found = [adapter.vision_tower(model, "image"), adapter.vision_tower(model, "video")]
    return list({id(tower.module): tower for tower in found}.values())


def watch(model: nn.Module, adapter: Adapter | None, shared: Shared) -> Callable[[], None]:
    """Note the attention that patches receive in the layer whose output becomes the features.

    From the class token where the tower has one, else the mean over all patches, as VisionZip does.
    """
    patches = Patches(shared.notes)
    taps = Taps()

    def arm(tower: VisionTower, layer: nn.Module, args: Any, kwargs: Any) -> None:
        def sink(states: AttentionStates) -> None:
            images, length = states.query.shape[0], states.query.shape[2]
            index = torch.arange(length, device=states.query.device).expand(images, -1)
            queries = Picked(index[:, : tower.special] if tower.special else index, run=0)
            columns = Picked(index[:, tower.special :], run=tower.special)
            with torch.no_grad():
                patches.add(states.received(queries, columns))

        taps.on(layer).arm(sink)

    undo: list[Callable[[], None]] = [taps.remove]
    for tower in towers(model, adapter):
        layer = tower.layers[tower.output - 1]
        taps.on(layer)
        undo.append(before_forward(layer, functools.partial(arm, tower)))
    return functools.partial(_undo, undo)


def shorten(
    model: nn.Module, adapter: Adapter | None, shared: Shared, layers: Sequence[int], choose: Choose
) -> Callable[[], None]:
    """Let patches leave in the given encoder layers; `Patches.of` says which survived (1) or not (0)."""
    patches = Patches(shared.notes)
    cuts = [TowerCut(tower, layers, choose) for tower in towers(model, adapter)]
    return functools.partial(_undo, [undo for cut in cuts for undo in [*cut.install(), *cut.restore(patches)]])


class TowerCut:
    """Cuts the sequence of a CLIP or SigLIP tower after the attention of chosen layers.

    The cut belongs between attention and MLP, where no module boundary is. But the MLP works on each token alone, so
    it is enough to write merged states into the stream there (the second norm's input *is* the residual stream) and to
    take the survivors from the layer's output.

    Args:
        tower: the tower.
        layers: 0-based encoder layers in which patches leave.
        choose: what becomes of the patches that reach such a layer.

    Raises:
        ConfigError: a layer behind the one whose output becomes the features.
    """

    def __init__(self, tower: VisionTower, layers: Sequence[int], choose: Choose) -> None:
        if any(not 0 <= layer < tower.output for layer in layers):
            raise ConfigError(f"vision layers {tuple(layers)}: only layers 0 to {tower.output - 1} shape the features")
        self.tower, self.layers, self.choose = tower, tuple(layers), choose
        self._taps = Taps()
        self._now = _Cut()

    @property
    def kept(self) -> Tensor | None:
        """(images, m) indices, into the original patches, of those that are left in this thread's call."""
        return self._now.kept

    def install(self) -> list[Callable[[], None]]:
        """Hook the layers; returns what undoes it."""
        undo: list[Callable[[], None]] = [self._taps.remove]
        for i in self.layers:
            layer = self.tower.layers[i]
            self._taps.on(layer)
            # Inside of the layer, as the merge is: gradient checkpointing runs a forward once more, but no hooks on it.
            undo.append(before_forward(attention_module(layer), functools.partial(self._listen, layer)))
            undo.append(before_forward(_second_norm(layer), self._merge))
            undo.append(behind_forward(layer, self._take))
        return undo

    def restore(self, patches: Patches) -> list[Callable[[], None]]:
        """Hook the tower, to put survivors back into the grid and report them."""

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._now.begin()

        def end(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            now, kept = self._now, self._now.kept
            if kept is None:
                return out
            for name, value in out.items():
                if isinstance(value, Tensor):
                    out[name] = self._spread(value)
                elif isinstance(value, tuple):
                    out[name] = tuple(self._spread(v) for v in value)
            survived = torch.zeros(len(kept), now.full - self.tower.special, device=kept.device)
            patches.add(survived.scatter(1, kept, 1.0), kept.shape[1])
            now.begin()
            now.over = True
            return out

        module = self.tower.module
        return [before_forward(module, begin), behind_forward(module, end)]

    def _listen(self, layer: nn.Module, attention: nn.Module, args: Any, kwargs: Any) -> None:
        self._taps.on(layer).arm(functools.partial(setattr, self._now, "states"))

    def _merge(self, norm: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> None:
        stream, states = args[0], self._now.states
        assert states is not None
        special = self.tower.special
        index = torch.arange(stream.shape[1], device=stream.device).expand(len(stream), -1)
        with torch.no_grad():
            received = states.received(Picked(index, run=0), Picked(index[:, special:], run=special))
            selection = self.choose(received)
        if selection.merge is not None:
            parts = stream.clone() if stream.requires_grad else stream  # what is read for gradients must stay as it was
            merge_states(parts, stream, selection.merge, special)
        self._now.keep, self._now.states = selection.keep, None

    def _take(self, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        now, special = self._now, self.tower.special
        assert now.keep is not None
        first = torch.arange(special, device=hidden.device).expand(len(hidden), -1)
        index = torch.cat([first, now.keep + special], 1)
        short = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        if not now.over:
            if now.kept is None:
                now.full = hidden.shape[1]
            now.kept = now.keep if now.kept is None else now.kept.gather(1, now.keep)
            now.lengths[short.shape[1]] = torch.cat([first, now.kept + special], 1)
        return (short, *out[1:]) if isinstance(out, tuple) else short

    def _spread(self, states: Any) -> Any:
        lengths = self._now.lengths
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[1] not in lengths:
            return states
        index = lengths[states.shape[1]][..., None].expand_as(states)
        return states.new_zeros(len(states), self._now.full, states.shape[2]).scatter(1, index, states)


class _Cut(threading.local):
    """What has become of the patches in the tower's running call; every thread has its own.

    Attributes:
        kept: (images, m) indices, into the original patches, of those that are left; None before anything has left.
        keep: the same of the last layer, into the patches that reached it.
        states: attention of the layer that runs.
        lengths: by length of a sequence, the original patches in it, special tokens included.
        full: length of the sequence before anything left.
        over: whether the tower has been left; gradient checkpointing runs layers once more then, the last one first.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new call."""
        self.kept: Tensor | None = None
        self.keep: Tensor | None = None
        self.states: AttentionStates | None = None
        self.lengths: dict[int, Tensor] = {}
        self.full = 0
        self.over = False


def _second_norm(layer: nn.Module) -> nn.Module:
    for name in ("layer_norm2", "layernorm_after", "norm2"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError(f"{type(layer).__name__} is not laid out like a CLIP or SigLIP encoder layer")


def _undo(steps: Sequence[Callable[[], None]]) -> None:
    for step in steps:
        step()
