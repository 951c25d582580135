"""A later turn that ranks anew: it reads the whole conversation again, with the tokens that its own question chooses.

What an earlier turn dropped is gone from the cache, so there is nothing to choose from in it. The cache is emptied
before `generate` looks at it, and filled again by a prefill of all turns, which costs what a first turn does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.cache_utils import DynamicLayer

from evengaze.engine import cache as kv
from evengaze.engine.generation import Request
from evengaze.errors import ConfigError


@contextmanager
def ranked_anew(request: Request, *, pictures: bool) -> Iterator[None]:
    """Let a call of `generate` begin with an empty cache, if the one that it is given is pruned and a question follows.

    A call that only goes on with an answer keeps its cache. After an error the cache is as it was.

    Args:
        request: the call.
        pictures: whether it has to bring its pictures (it does not, where a layout says where they are).

    Raises:
        ConfigError: the call brings no pictures to rank.
    """
    cache, prompt = request.cache, request.prompt
    past = 0 if cache is None else int(cache.get_seq_length())
    # The last token of an answer is not in the cache yet, so one token more is no question.
    if prompt is None or past == 0 or prompt.shape[1] - past <= 1 or not _pruned(cache):
        yield
        return
    if pictures and not request.brings_pictures:
        raise ConfigError(
            "rerank=True: a later turn ranks the pictures of the whole conversation anew, but this call brings none. "
            "Pass what the processor makes of all messages, pixel_values included, or attach without rerank."
        )
    layers = cache.layers
    cache.layers = [_emptied(layer) for layer in layers]
    try:
        yield
    except BaseException:
        cache.layers = layers
        raise


def _emptied(layer: Any) -> Any:
    """A layer like another one, without entries."""
    if isinstance(layer, DynamicLayer):
        empty = copy.copy(layer)
        empty.keys = empty.values = None
        empty.is_initialized = False
    else:
        empty = copy.deepcopy(layer)  # a buffer is written over in place
    empty.reset()
    return empty


def _pruned(cache: Any) -> bool:
    return any(kv.kept_of(layer) is not None for layer in getattr(cache, "layers", ()))
