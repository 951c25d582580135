"""How LLaVA's scripts divide a question file over processes (``split_list``, ``get_chunk``)."""

from __future__ import annotations

import math

from evengaze.errors import ConfigError


def chunk_range(n: int, chunks: int, index: int) -> range:
    """Return which of ``n`` questions belong to a chunk: consecutive slices of ceil(n / chunks).

    Raises:
        ConfigError: There is no such chunk; rounding up can leave fewer than were asked for.
    """
    if n < 1 or chunks < 1:
        raise ConfigError(f"{n} questions cannot be divided into {chunks} chunks.")
    size = math.ceil(n / chunks)
    start = index * size
    if not 0 <= start < n:
        raise ConfigError(f"there is no chunk {index}: {n} questions in {chunks} chunks make {math.ceil(n / size)}.")
    return range(start, min(start + size, n))
