"""The first prompt of a model that was never tried: did the decoder do what pruning relies on?

The generic adapter knows nothing of a family. What it cannot know beforehand is looked at afterwards, once for each
attachment: the layers that ran, the length of what came out, and what the caches hold. What does not hold is an error
that names it, before a wrong answer is used.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from evengaze.engine import cache as kv
from evengaze.engine.prefill import Prefill
from evengaze.errors import UnsupportedModelError
from evengaze.trace import Trace


def check_first(model: nn.Module, run: Prefill, trace: Trace, out: Any, borrowing: Collection[int]) -> None:
    """Compare the first prefill with its plan.

    Args:
        model: the model.
        run: the prefill.
        trace: its record: by the stages, how many tokens entered each layer.
        out: what the decoder returned.
        borrowing: layers without a cache of their own.

    Raises:
        UnsupportedModelError: they differ.
    """
    if run.entered > run.watched:
        raise _wrong(model, f"its {run.watched} decoder layers ran {run.entered} times")
    states = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", None)
    left = run.length if run.slots is None else run.slots.shape[1]
    if isinstance(states, Tensor) and states.shape[1] not in (left, *run.narrow.values()):
        raise _wrong(model, f"the decoder returned {states.shape[1]} tokens where pruning left {left}")
    for i, length in enumerate(trace.entering):
        layer = kv.layer_of(run.cache, i)
        if run.past or layer is None or i in borrowing or kv.is_sliding(layer) or not layer.is_initialized:
            continue
        held = kv.stored(layer)
        if held not in (length, left):  # some methods also empty the caches below a stage
            raise _wrong(model, f"the cache of layer {i} holds {held} tokens, but {length} entered the layer")


def note_failure(model: nn.Module) -> None:
    """Say in an exception that is on its way that pruning may be its cause."""
    error = sys.exception()
    if error is not None:
        error.add_note(
            f"evengaze: this was the first prompt of a {_kind(model)!r} model, which the generic adapter serves. "
            "If the same call works without a pruner, the family needs an adapter of its own; please report it."
        )


def _wrong(model: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the first prompt of a {_kind(model)!r} model did not go as pruning needs: {what}. Answers would be wrong: "
        "the family cannot be pruned through the generic adapter. Register an adapter of its own, and please report it."
    )


def _kind(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.model_type)
