"""An ASGI application asked from within the process: a request as data, its answer as messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, MutableMapping
from typing import Any

from evengaze.serve.gate import App

Message = MutableMapping[str, Any]

_HEAD = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client")


def head_of(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What of a connection's scope can be sent to another process."""
    return {name: scope[name] for name in _HEAD if name in scope}


async def messages(app: App, head: Mapping[str, Any], body: bytes) -> AsyncIterator[Message]:
    """The messages of an application's answer to one request, as they come.

    The application takes who stops iterating for a client that went away.

    Args:
        app: the application.
        head: the connection's scope, as from `head_of`.
        body: the whole body of the request.
    """
    path = head["path"]
    scope = {"asgi": {"version": "3.0"}, "root_path": "", "raw_path": path.encode(), **head, "state": {}}
    told: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, told.put)
        finally:
            told.put_nowait(None)

    running = asyncio.create_task(run())
    running.add_done_callback(_seen)
    try:
        while (message := await told.get()) is not None:
            yield message
        await running  # raises what the application has raised
    finally:
        gone.set()


def _seen(task: asyncio.Task[None]) -> None:
    """An error of an answer that nobody waits for is no error of the server's."""
    if not task.cancelled():
        task.exception()
