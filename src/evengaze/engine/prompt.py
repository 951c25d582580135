"""From the arguments of a decoder call to the prefill that they are, if they hold visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from evengaze.engine import cache as kv
from evengaze.engine import cache_layers, checks
from evengaze.engine.call import Call
from evengaze.engine.masks import read_prompt, real_tokens
from evengaze.engine.plan import Plan
from evengaze.engine.prefill import Prefill
from evengaze.engine.question import Clues, Questions, Said, answered_in, clues, questions, said_of
from evengaze.errors import LayoutError
from evengaze.layout import VisualLayout
from evengaze.memory import Shared
from evengaze.models.base import Call as Prompt
from evengaze.models.base import has_windows


class Prompts:
    """The prompts of one attachment.

    Args:
        plan: of the attachment.
        said: gives where the caller says that prompts end.
        shared: what methods keep for the attachment.
    """

    def __init__(self, plan: Plan, said: Callable[[], Said], shared: Shared) -> None:
        self._plan, self._said, self._shared = plan, said, shared
        self._warned = self._told = False
        self._windowed = has_windows(plan.decoder.config)

    def begin(self, call: Call, states: Tensor, kwargs: dict[str, Any], cache: Any, *, watched: int) -> Prefill | None:
        """The prefill; None if the call holds no visual tokens, or none that it brings itself.

        Args:
            call: the running call.
            states: (B, L) token ids or (B, L, d) embeddings that enter the decoder.
            kwargs: the decoder's arguments by name.
            cache: the decoder's.
            watched: number of layers that are hooked.
        """
        plan = self._plan
        ids, given = call.ids, call.mask if call.mask is not None else kwargs.get("attention_mask")
        call.ids = call.mask = None
        encoded, placed = call.encoded.calls, tuple(call.encoded.placed)
        notes = call.encoded.noted()
        call.encoded.take()
        length, past = states.shape[1], kv.length_of(cache)
        real = real_tokens(given, states, past)
        if not states.is_floating_point():
            states = plan.decoder.get_input_embeddings()(states)
        elif plan.adapter is not None and ids is None and past == 0 and not encoded:
            self._warn_blind()
        frozen = call.continued(states) if cache is None else None
        padded: Tensor | None = None
        if frozen is not None:
            layout: VisualLayout | None = frozen.layout
        elif (past or call.drafting) and not call.pictured and not encoded:
            return None  # placeholder ids in later text, or from a draft, are no pictures
        else:
            ids, padded = read_prompt(ids, real)
            layout = self._find(Prompt(ids, padded, past, encoded, placed), length)
        if layout is None or layout.total == 0:
            return None
        kv.check(cache)
        checks.refuse_checkpointing(plan.layers)
        if plan.adapter is not None and self._windowed:
            plan.adapter.check_windows(plan.model, plan.ranked_by, past + length)
        layout = VisualLayout(tuple(row.to("cpu") for row in layout.expand(states.shape[0]).rows))
        if frozen is not None and given is not None:
            _, padded = read_prompt(None, real)
        known = clues(
            kwargs, call, length=length, masked=given is not None, past=past, said=said_of(self._said(), ids, past)
        )
        asked = None if frozen is not None else questions(layout, padded, length, known)
        self._warn_answers(asked, padded, known, length)
        return Prefill(
            layout=layout,
            padded=padded,
            asked=asked,
            samples=known.samples_of(states),
            real=None if padded is None else real,
            inputs=states,
            past=past,
            config=plan.decoder.config,
            rotary=call.rotary if plan.pruner.positions == "renumbered" else None,
            cache=cache,
            fresh=cache_layers.gate_of(cache) is None,
            watched=watched,
            shared=self._shared,
            notes=notes,
            replay=None if frozen is None else frozen.selections,
            recurrent=plan.recurrent,
        )

    def _find(self, prompt: Prompt, length: int) -> VisualLayout | None:
        """The layout of a call, as it was given or as the adapter sees it."""
        plan = self._plan
        layout: VisualLayout | None
        if plan.adapter is None:
            layout = None if prompt.past else plan.layout  # spans describe the prompt, not what follows it
        else:
            layout = plan.adapter.layout(plan.model, prompt)
            if prompt.encoded and (layout is None or layout.total == 0):
                raise LayoutError(
                    "images or videos were encoded, but the prompt has no visual tokens. Build the inputs with the "
                    "model's processor, with one image placeholder in the text for each image."
                )
        reach = max((row.span[1] for row in layout.rows), default=0) if layout is not None else 0
        if reach > length:
            raise LayoutError(f"the layout reaches to token {reach}, but the call has only {length} tokens")
        return layout

    def _warn_blind(self) -> None:
        if self._plan.stages and not self._warned:
            self._warned = True
            checks.warn_blind(self._plan.model, self._plan.pruner)

    def _warn_answers(self, asked: Questions | None, padded: Tensor | None, known: Clues, length: int) -> None:
        if self._plan.trims and not self._told and asked is not None and answered_in(asked, padded, known, length):
            self._told = True
            checks.warn_answers(self._plan.pruner)
