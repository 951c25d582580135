"""Whether a hub id can be had: said at once, instead of after a minute of retries."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from evengaze.errors import DataError

PATIENCE = 5.0
"""Seconds to wait for the hub's first answer."""


def ensure_reachable(
    source: str, *, revision: str | None = None, name: str | None = None, file: str = "config.json"
) -> None:
    """Find out whether a hub id is in the cache or can be asked for, before a library retries to.

    With a copy in the cache and no network, the cache alone is used from here on (as with `HF_HUB_OFFLINE=1`).

    Args:
        source: hub id, or a local folder, which needs no hub.
        revision: on the hub.
        name: what the message calls the checkpoint; default: `source`.
        file: one of its files.

    Raises:
        DataError: it is in no cache, and there is no network, or `HF_HUB_OFFLINE` forbids to use it.
    """
    if Path(source).exists():
        return
    try:
        cached = isinstance(try_to_load_from_cache(source, file, revision=revision), str)
    except HFValidationError:  # what it is will be said by who loads it
        return
    if constants.HF_HUB_OFFLINE:
        variable = next((v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(v)), "HF_HUB_OFFLINE")
        why = f"{variable}={os.environ.get(variable, 1)} is set, so nothing is downloaded. Unset it"
    elif not _answers(constants.ENDPOINT):
        why = f"{constants.ENDPOINT} cannot be reached. Connect to the network"
        constants.HF_HUB_OFFLINE = cached
    else:
        return
    if not cached:
        raise DataError(
            f"{name or source}: there is no such folder here, the hub's cache ({constants.HF_HUB_CACHE}) holds no such "
            f"model, and {why}, or give a local folder, or 'demo' for the embedded model."
        )


@lru_cache(maxsize=4)
def _answers(endpoint: str) -> bool:
    try:
        get_session().head(endpoint, timeout=PATIENCE)
    except Exception:  # whichever library the hub's client speaks through
        return False
    return True
