"""FastV as its default script and the debiasing study run it: nothing is removed, attention is masked.

From layer K on nobody may attend to the visual tokens outside the top R. They still run, their keys and values stay in
every cache, and each generated token ranks again, so tokens that were masked before may come back. It saves nothing.
Source: `modeling_llama.py` of FastV (a transformers 4.31 fork), the branch without `fast_v_inplace`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evengaze.candidates import Candidates
from evengaze.compat import cache_in
from evengaze.engine import cache as kv
from evengaze.engine.attention import AttentionStates
from evengaze.engine.intercept import before_forward
from evengaze.engine.masks import causal_mask, mask_columns, take_mask
from evengaze.engine.tap import Taps
from evengaze.errors import ConfigError
from evengaze.memory import Shared, Store
from evengaze.methods.fastv import FastV
from evengaze.methods.registry import register
from evengaze.models import find_decoder
from evengaze.models.base import Adapter, attending_layers
from evengaze.protocol import Mode, Selection, View, Words


@register
@dataclass(frozen=True)
class FastVMasked(FastV):
    """FastV with masks instead of removal, ranking again in every decoding step.

    To the engine it is a method that keeps everything; the masks are its own.
    """

    mode: Mode = field(default="official", kw_only=True)

    name: ClassVar[str] = "fastv-masked"

    def select(self, view: View) -> Sequence[Selection]:
        """Note the choice for the masks, and keep all."""
        masks = view.shared.get(_Masks)
        assert masks is not None
        chosen = super().select(view)
        for selection in chosen:
            masks.choose(view, selection)
        every = Selection.everything(view)
        return [replace(every, keep=every.keep[: len(s.keep)], raw=s.raw, scores=s.scores, rows=s.rows) for s in chosen]

    def prepare(self, model: nn.Module, adapter: Adapter | None, shared: Shared) -> Callable[[], None]:
        """Mask the layers from `layer` on, in the prefill and in every step."""
        decoder = find_decoder(model) if adapter is None else adapter.decoder(model)
        masks = _Masks(self, decoder, shared.call)
        shared.put(masks)
        layers = list(decoder.get_submodule("layers").children())
        able = attending_layers(layers)
        blind = [i for i in range(self.layer, len(layers)) if i not in able]
        if blind:
            raise ConfigError(
                f"{self.name} hides tokens from the attention of layers, but layers {', '.join(map(str, blind))} of "
                f"this model ({type(layers[blind[0]]).__name__}) carry a state through the sequence, from which "
                "nothing can be hidden. Use fastv, which removes the tokens."
            )
        masks.taps.on(layers[self.layer - 1])
        undo: list[Callable[[], None]] = [masks.taps.remove, before_forward(decoder, masks.begin)]
        undo += [before_forward(layers[self.layer - 1], masks.listen)]
        undo += [before_forward(layer, masks.apply) for layer in layers[self.layer :]]

        def remove() -> None:
            for step in undo:
                step()

        return remove


_CHOSEN = "evengaze_masked"

Pictures = dict[int, list[tuple[Candidates, Tensor]]]
"""For each row and each turn with pictures its tokens, with positions in the whole sequence, and which were chosen."""


@dataclass
class _Call:
    """A call of the decoder.

    Attributes:
        cache: its cache.
        past: cached tokens in front of it.
        old: what earlier calls on the cache chose.
        new: what this one chose of its own pictures.
        states: attention by which the old ones are ranked anew.
        visible: (B, past + L) which tokens may be seen.
    """

    cache: Any
    past: int
    old: Pictures
    new: Pictures = field(default_factory=dict)
    states: AttentionStates | None = None
    visible: Tensor | None = None


class _Masks:
    """The masks of all calls; what a call chose goes on with its cache."""

    def __init__(self, method: FastVMasked, decoder: nn.Module, running: Callable[[], Store]) -> None:
        self.method, self.taps, self.running = method, Taps(running), running
        self.decoder: Any = decoder

    @property
    def call(self) -> _Call:
        """The running one."""
        call = self.running().get(_Call)
        assert call is not None
        return call

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A prompt forgets the one before it; a step goes on from it."""
        cache = cache_in(args, kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.taps.disarm()  # left by a call that was interrupted
        self.running().put(_Call(cache, past, getattr(cache, _CHOSEN, {}) if past else {}))

    def choose(self, view: View, chosen: Selection) -> None:
        """Note what stays visible of new pictures."""
        for b, keep in zip(chosen.rows or range(len(view.rows)), chosen.keep, strict=True):
            tokens = view.tokens.select([b])
            moved = replace(tokens, position=tokens.position + self.call.past)
            # Of a packed row each sample comes by itself.
            self.call.new.setdefault(view.rows[b], []).append((moved, keep))

    def listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the attention that ranks the pictures of earlier calls."""
        if self.call.old:
            call = self.call
            self.taps.on(module).arm(functools.partial(setattr, call, "states"), past=call.past)

    def apply(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hide the tokens that were not chosen from all queries."""
        call = self.call
        if not call.old and not call.new:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if call.visible is None:
            call.visible = self._visible(hidden)
        mask = kwargs.get("attention_mask")
        if mask is None:
            implementation = self.decoder.config._attn_implementation or "eager"
            mask = causal_mask(call.visible, hidden.shape[1], implementation, hidden.dtype)
            buffer = kv.layer_of(call.cache, self.method.layer)
            if kv.is_fixed(buffer):
                hide = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
                mask = torch.nn.functional.pad(mask, (0, buffer.max_cache_len - mask.shape[-1]), value=hide)
        else:
            size, ahead = mask_columns(mask), mask_columns(mask) - call.visible.shape[1]
            # A static buffer has columns for tokens to come, a sliding layer only those of the last tokens.
            visible = torch.nn.functional.pad(call.visible, (0, max(0, ahead)), value=True)[:, -size:]
            mask = take_mask(mask, None, torch.arange(size, device=hidden.device).expand(len(hidden), -1), visible)
        return args, {**kwargs, "attention_mask": mask}

    def _visible(self, hidden: Tensor) -> Tensor:
        call = self.call
        rows: Pictures = {b: list(new) for b, new in call.new.items()}
        for b, old in call.old.items():
            rows.setdefault(b, []).extend((tokens, self._rank(b, tokens, hidden)) for tokens, _ in old)
        visible = torch.ones(len(hidden), call.past + hidden.shape[1], dtype=torch.bool, device=hidden.device)
        for b, pictures in rows.items():
            for tokens, keep in pictures:
                visible[b, tokens.position[0]] = False
                visible[b, tokens.position[0, keep]] = True
        if call.cache is not None:
            setattr(call.cache, _CHOSEN, rows)  # and goes where the cache goes
        return visible

    def _rank(self, row: int, tokens: Candidates, hidden: Tensor) -> Tensor:
        """Choose by the last new token. Positions count from the call's first token, so older ones are negative."""
        one, states = slice(row, row + 1), self.call.states
        moved = replace(tokens, position=tokens.position - self.call.past)
        real = torch.ones(1, hidden.shape[1], dtype=torch.bool, device=hidden.device)
        view = View(
            stage=0,
            tokens=moved,
            original=len(tokens),
            hidden=hidden[one],
            embeddings=hidden[one],
            words=Words.among(real, moved.position),
            sources=[self.method.attention],
            states=None if states is None else states.select(one),
            rows=(row,),
        )
        return FastV.select(self.method, view)[0].keep[0]
