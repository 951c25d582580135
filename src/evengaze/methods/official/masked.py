"""FastV as its default script and the debiasing study run it: nothing is removed, attention is masked.

From layer K on nobody may attend to the visual tokens outside the top R. They still run, their keys and values stay in
every cache, and each generated token ranks again, so tokens that were masked before may come back. It saves nothing.
Source: `modeling_llama.py` of FastV (a transformers 4.31 fork), the branch without `fast_v_inplace`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evengaze.compat import cache_in
from evengaze.engine.attention import AttentionStates
from evengaze.engine.intercept import before_forward
from evengaze.engine.masks import causal_mask, take_mask
from evengaze.engine.tap import Taps
from evengaze.layout import Candidates
from evengaze.methods.fastv import FastV
from evengaze.methods.registry import register
from evengaze.models import find_decoder
from evengaze.models.base import Adapter
from evengaze.protocol import Mode, Selection, Shared, View, Words


@register
@dataclass(frozen=True)
class FastVMasked(FastV):
    """FastV with masks instead of removal, ranking again in every decoding step. One generation at a time.

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
        masks = _Masks(self, decoder)
        shared.put(masks)
        layers = list(decoder.get_submodule("layers").children())
        undo = [masks.taps.remove, before_forward(decoder, masks.begin)]
        undo += [before_forward(layers[self.layer - 1], masks.listen)]
        undo += [before_forward(layer, masks.apply) for layer in layers[self.layer :]]

        def remove() -> None:
            for step in undo:
                step()

        return remove


class _Masks(threading.local):
    """The masks of the call in progress; every thread has its own."""

    def __init__(self, method: FastVMasked, decoder: nn.Module) -> None:
        self.method, self.taps = method, Taps()
        self.decoder: Any = decoder
        self.past = 0
        self.rows: dict[int, tuple[Candidates, Tensor]] = {}
        self.states: AttentionStates | None = None
        self.visible: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A prompt forgets the one before it; a step goes on from it."""
        cache = cache_in(args, kwargs)
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.visible = self.states = None
        if self.past == 0:
            self.rows = {}

    def choose(self, view: View, chosen: Selection) -> None:
        """Note what stays visible."""
        for b, keep in zip(chosen.rows or range(len(view.rows)), chosen.keep, strict=True):
            self.rows[view.rows[b]] = (view.tokens.select([b]), keep)

    def listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In a step, read the attention that ranks; in the prefill the engine does."""
        if self.past and self.rows:
            self.taps.on(module).arm(functools.partial(setattr, self, "states"), past=self.past)

    def apply(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hide the tokens that were not chosen from all queries."""
        rows = self.rows
        if not rows:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.visible is None:
            if self.states is not None:
                rows = {b: (tokens, self._rank(b, tokens, hidden)) for b, (tokens, _) in rows.items()}
            self.visible = torch.ones(len(hidden), self.past + hidden.shape[1], dtype=torch.bool, device=hidden.device)
            for b, (tokens, keep) in rows.items():
                self.visible[b, tokens.position[0]] = False
                self.visible[b, tokens.position[0, keep]] = True
        mask = kwargs.get("attention_mask")
        if mask is None:
            implementation = self.decoder.config._attn_implementation or "eager"
            mask = causal_mask(self.visible, hidden.shape[1], implementation, hidden.dtype)
        else:
            columns = torch.arange(self.visible.shape[1], device=hidden.device).expand(len(hidden), -1)
            mask = take_mask(mask, None, columns, self.visible)
        return args, {**kwargs, "attention_mask": mask}

    def _rank(self, row: int, tokens: Candidates, hidden: Tensor) -> Tensor:
        """Choose by the new token. Positions count from the call's first token, so the prompt's are negative."""
        one = slice(row, row + 1)
        moved = replace(tokens, position=tokens.position - self.past)
        real = torch.ones(1, hidden.shape[1], dtype=torch.bool, device=hidden.device)
        view = View(
            stage=0,
            tokens=moved,
            original=len(tokens),
            hidden=hidden[one],
            embeddings=hidden[one],
            words=Words.among(real, moved.position),
            sources=[self.method.attention],
            states=None if self.states is None else self.states.select(one),
            rows=(row,),
        )
        return FastV.select(self.method, view)[0].keep[0]
