"""The part of a server on Ray that clients meet: it lets requests in, and sends each to a replica of the model.

A replica that dies takes no request with it. Answers have no effects but themselves, so what was not yet answered is
sent to another replica; what cannot be is told so: 503 with a Retry-After, or an error in the stream that has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from evengaze.serve.asgi import Message, head_of
from evengaze.serve.errors import ApiError, lost
from evengaze.serve.gate import Gate, Receive, Scope, Send, departure, unless_gone
from evengaze.serve.handlers import explain_errors
from evengaze.serve.metrics import labelled
from evengaze.serve.settings import Settings
from evengaze.version import __version__

RESENDS = 2
"""So many replicas may die on one request before it is given back to its client: it may be what kills them."""
_log = logging.getLogger(__name__)


class FrontMetrics:
    """What one front counts; names as in `evengaze.serve.metrics`, with `front` in them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        where: Any = {"registry": self.registry, "namespace": "evengaze", "subsystem": "front"}
        self.requests = Counter("requests", "Requests by HTTP status.", ["status"], **where)
        self.places = Gauge("requests_in_progress", "Requests that hold a place.", **where)
        self.left = Counter("disconnects", "Clients that went away before their answer began.", **where)
        self.resent = Counter("resent", "Requests sent again as a replica died on them.", **where)
        self.lost = Counter("lost", "Requests given back to their clients as replicas died on them.", **where)


METRICS = FrontMetrics()
"""Of the front in this process."""


class Forward:
    """An ASGI application that has requests answered by a replica.

    Args:
        answer: called with a request's head and body; gives its answer's messages, and has `cancel()`.
        died: exceptions which say that the replica is no more.
        seconds: from a request's arrival to the end of its answer.
    """

    def __init__(self, answer: Callable[..., Any], died: tuple[type[Exception], ...], seconds: float) -> None:
        self._answer, self._died, self._seconds = answer, died, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        end = monotonic() + self._seconds
        body = (await receive()).get("body", b"")  # the gate has read all of it
        gone = asyncio.create_task(departure(receive))
        sent = _Sent(send)
        try:
            for left in range(RESENDS, -1, -1):
                try:
                    await self._forward(head_of(scope), body, sent, gone, end)
                    return
                except self._died as error:
                    _log.warning("a replica died on a request: %s", str(error).partition("\n")[0])
                    if sent.begun or not left:
                        METRICS.lost.inc()
                        raise lost() from None
                    METRICS.resent.inc()
        except ApiError as error:
            if not sent.begun:
                raise
            await sent.fail(error)
        finally:
            gone.cancel()

    async def _forward(
        self, head: dict[str, Any], body: bytes, sent: _Sent, gone: asyncio.Task[None], end: float
    ) -> None:
        """Send one replica's answer on, as it comes.

        Raises:
            ApiError: it took too long.
            ClientGone: the client went away.
        """
        answer = self._answer(head, body)
        messages = aiter(answer)
        try:
            while True:
                await sent.send(await unless_gone(anext(messages), gone, end, self._seconds))
        except StopAsyncIteration:
            return
        finally:
            answer.cancel()


class _Sent:
    """What has been sent of an answer. Its head waits for the first piece, so that a replica may die in between."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self._streams = False
        self.begun = False

    async def send(self, message: Message) -> None:
        """Send a message on, sooner or later."""
        if message["type"] == "http.response.start":
            self._head = message
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            return
        if not self.begun:
            assert self._head is not None
            self.begun = True
            await self._send(self._head)
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """End what has begun: a stream by an event, anything else by cutting it."""
        if not self._streams:
            raise error
        event = f"data: {json.dumps(error.body)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def build_front(
    settings: Settings,
    answer: Callable[..., Any],
    everywhere: Callable[[str], Any],
    died: tuple[type[Exception], ...],
) -> FastAPI:
    """The application that forwards requests to replicas.

    Args:
        settings: whose key and limits hold.
        answer: see `Forward`.
        everywhere: called with the name of a method; awaits what it gives on each front and replica that can be
            reached, as two lists.
        died: see `Forward`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.metrics = METRICS
        yield

    async def health() -> Response:
        _, alive = await everywhere("alive")
        count = sum(alive)
        return JSONResponse(
            {"status": "ok" if count else "no replica answers", "replicas": count}, 200 if count else 503
        )

    async def metrics() -> Response:
        fronts, replicas = await everywhere("metrics")
        return Response(labelled(dict([*fronts, *replicas])), media_type=CONTENT_TYPE_LATEST)

    app = FastAPI(title="Evengaze", version=__version__, lifespan=lifespan, openapi_url=None)
    app.add_middleware(Gate, settings=settings)
    explain_errors(app)
    app.get("/health")(health)
    app.get("/metrics", response_class=Response)(metrics)
    app.mount("/v1", Forward(answer, died, settings.limits.seconds))
    return app


def front_text() -> str:
    """What the front of this process has counted."""
    return generate_latest(METRICS.registry).decode()
