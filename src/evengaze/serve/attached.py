"""Methods that stay attached from batch to batch, as long as the same one is asked for; their graphs outlive them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from evengaze.engine.graphs import Graphs
from evengaze.errors import out_of_memory
from evengaze.methods import Pruner

if TYPE_CHECKING:
    from evengaze.engine.session import Handle

MULTIPLE = 32
"""Prompts are padded to multiples of so many tokens where graphs are kept, so that their shapes come again."""


class Attached:
    """What attaches methods for one thread.

    Args:
        graphs: whether the layers between stages are captured as graphs; see `Pruner.__call__`.
    """

    def __init__(self, graphs: bool) -> None:
        self._graphs = Graphs() if graphs else None
        self._handle: Handle | None = None
        self._key: str | None = None

    def of(self, pruner: Pruner) -> Callable[[Any], AbstractContextManager[Handle]]:
        """Attaches a method to a model, for as long as the context lasts or another method is asked for."""
        return pruner if self._graphs is None else self._kept(pruner, self._graphs)

    def _kept(self, pruner: Pruner, graphs: Graphs) -> Callable[[Any], AbstractContextManager[Handle]]:
        @contextmanager
        def attached(model: Any) -> Iterator[Handle]:
            key = json.dumps(pruner.to_dict(), sort_keys=True)
            if self._handle is None or key != self._key:
                self.close()
                self._handle, self._key = pruner(model, graphs=graphs), key
            self._handle.trace = None  # a call without pictures leaves the last call's
            self._handle.traces.clear()  # of which it keeps a thousand
            try:
                yield self._handle
            except BaseException as error:  # the next batch begins with nothing of this one's
                self.close()
                if out_of_memory(error):
                    graphs.clear()
                raise

        return attached

    def close(self) -> None:
        """Detach what is attached."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()
