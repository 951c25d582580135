"""Who may come in: keys, places, and the size and patience of bodies, before anything reads them."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from time import monotonic
from typing import Any, TypeVar

from fastapi.responses import JSONResponse

from evengaze.serve.errors import ApiError, broken, full, late
from evengaze.serve.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_T = TypeVar("_T")

_log = logging.getLogger(__name__)
_PATIENCE = 4
"""So many times the limit of a body is read, and thrown away, before the connection is cut: a client that is still
sending does not see the answer."""

OPEN = ("/health", "/metrics")
"""Paths that need no key."""


class ClientGone(Exception):
    """The client went away while its request was being read."""


class Gate:
    """An ASGI middleware. A request holds a place from before its body is read until its answer has been sent, and
    whatever is raised before that is answered in OpenAI's form, on a connection that stays open.

    The whole body is read before the app sees the request, so that the app may listen for nothing but the client's
    leaving.
    """

    def __init__(self, app: App, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, started, posted = scope["app"].state.metrics, False, scope["method"] == "POST"

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if posted or message["status"] >= 400:  # before it is sent: whoever reads it finds it counted
                    metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        with contextlib.ExitStack() as held:  # the place is free again when all is counted
            try:
                self._check_key(scope)
                if posted:
                    held.enter_context(self._place(metrics))
                    receive = _replayed(await self._read(scope, receive), receive)
                await self._app(scope, receive, counted)
            except ClientGone:
                pass
            except Exception as error:
                if started:  # the connection is closed behind it: half an answer must not look whole
                    raise
                if not isinstance(error, ApiError):
                    _log.exception("%s %s failed", scope["method"], scope["path"])
                    error = broken()
                await refuse(error)(scope, receive, counted)
            if posted and not started:
                metrics.left.inc()
                metrics.requests.labels("499").inc()

    @contextlib.contextmanager
    def _place(self, metrics: Any) -> Iterator[None]:
        if self._taken >= self._settings.limits.queue:
            raise full(self._settings.limits.queue)
        self._taken += 1
        metrics.places.set(self._taken)
        try:
            yield
        finally:
            self._taken -= 1
            metrics.places.set(self._taken)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        seconds = self._settings.limits.seconds
        try:
            return await asyncio.wait_for(self._body(scope, receive), seconds)
        except TimeoutError:
            raise ApiError(408, f"the request was not sent within {seconds:g} seconds") from None

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        size = self._settings.limits.body
        large = ApiError(413, f"the request has more than {size:,} bytes", code="too_large")
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > _PATIENCE * size:
            raise large
        pieces, total, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece, more = message.get("body", b""), message.get("more_body", False)
            total += len(piece)
            if total <= size:
                pieces.append(piece)
            elif total > _PATIENCE * size:
                raise large
        if total > size:
            raise large
        return b"".join(pieces)

    def _check_key(self, scope: Scope) -> None:
        key = self._settings.key
        if key is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")


def refuse(error: ApiError) -> JSONResponse:
    """The answer that says what went wrong."""
    return JSONResponse(error.body, error.status, headers=error.headers)


async def departure(receive: Receive) -> None:
    """Returns when the client goes away; the request's body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(result: Awaitable[_T], gone: asyncio.Future[None], end: float, seconds: float) -> _T:
    """What is awaited, while there is a client who waits for it.

    Args:
        result: what is awaited; it is cancelled if it does not come.
        gone: done when the client has left, as by `departure`.
        end: until when there is time, by `time.monotonic`.
        seconds: how much there was.

    Raises:
        ApiError: it took too long.
        ClientGone: the client went away.
    """
    coming = asyncio.ensure_future(result)
    both: set[asyncio.Future[Any]] = {coming, gone}
    try:
        done, _ = await asyncio.wait(both, timeout=max(0, end - monotonic()), return_when=asyncio.FIRST_COMPLETED)
        if coming not in done:
            raise ClientGone if gone in done else late(seconds)
        return coming.result()
    finally:
        coming.cancel()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What gives a body that has been read once more, and then whatever else comes."""
    waiting = [body]

    async def again() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again
