"""The FastAPI application: OpenAI's chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from time import monotonic
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from evengaze.evaluate.predictor import Predictor
from evengaze.serve.errors import ApiError
from evengaze.serve.gate import ClientGone, Gate, departure, unless_gone
from evengaze.serve.handlers import explain_errors
from evengaze.serve.jobs import Delta, Done, Event, Failed, Job
from evengaze.serve.metrics import Metrics
from evengaze.serve.prompts import Prompts
from evengaze.serve.pruning import Methods
from evengaze.serve.schema import ChatRequest
from evengaze.serve.settings import Settings
from evengaze.serve.worker import Worker
from evengaze.version import __version__

_CHUNK = "chat.completion.chunk"


class Service:
    """A loaded model behind the app: turns requests into jobs, and jobs into events.

    Raises:
        EvengazeError: the model cannot be served by the method that requests get if they name none.
    """

    def __init__(self, settings: Settings, metrics: Metrics, predictor: Predictor | None = None) -> None:
        self.settings = settings
        predictor = predictor or Predictor.load(settings.spec)
        self.methods = Methods(predictor, settings.method, settings.debias)
        self.methods.try_out(settings.graphs)
        self.prompts = Prompts(predictor, settings)
        self.worker = Worker(predictor, settings.limits, metrics, settings.graphs)

    async def job(self, asked: ChatRequest, arrived: float) -> Job:
        """The job of a request; pictures are decoded in a thread of their own.

        Raises:
            ApiError: the request asks for what is not to be had.
        """
        if asked.model != self.settings.model:
            text = f"there is no model {asked.model!r} here, only {self.settings.model!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        limits = self.settings.limits
        tokens = asked.asked_tokens or min(limits.new_tokens, 256)
        if tokens > limits.new_tokens:
            text = f"{tokens} tokens are asked for; this server gives up to {limits.new_tokens}"
            raise ApiError(400, text, param="max_tokens")
        pruner = self.methods.of(asked.evengaze)
        prompt, images = await asyncio.to_thread(self.prompts.of, asked.messages)
        return Job(
            prompt,
            images,
            pruner,
            tokens,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            stops=asked.stops,
            stream=bool(asked.stream),
            seconds=limits.seconds,
            arrived=arrived,
        )

    async def events(self, job: Job, request: Request) -> AsyncGenerator[Event, None]:
        """What becomes of a job. However this ends, the job no longer holds anything.

        Raises:
            ApiError: it failed, or took too long.
            ClientGone: the client went away.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job.tell = lambda event: _tell(loop, queue, event)
        gone = asyncio.create_task(departure(request.receive))
        self.worker.submit(job)
        try:
            while True:
                event = await unless_gone(queue.get(), gone, job.arrived + job.seconds, job.seconds)
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            gone.cancel()
            self.worker.drop(job)


def build_app(settings: Settings, predictor: Predictor | None = None) -> FastAPI:
    """The application; its model is loaded when it starts.

    Args:
        settings: what to serve.
        predictor: a model that is loaded already.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.metrics = Metrics()
        app.state.service = await asyncio.to_thread(Service, settings, app.state.metrics, predictor)
        app.state.started = int(time.time())
        yield
        await asyncio.to_thread(app.state.service.worker.close)

    app = FastAPI(title="Evengaze", version=__version__, lifespan=lifespan)
    app.add_middleware(Gate, settings=settings)
    explain_errors(app)
    app.post("/v1/chat/completions", response_model=None)(complete)
    app.get("/v1/models")(models)
    app.get("/v1/models/{name:path}")(model)
    app.get("/health")(health)
    app.get("/metrics", response_class=Response)(metrics)
    return app


# -- paths -------------------------------------------------------------------------------------------------------------
async def complete(asked: ChatRequest, request: Request) -> Response:
    """Answer a chat completion request."""
    service: Service = request.app.state.service
    job = await service.job(asked, monotonic())
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    events = service.events(job, request)
    if asked.stream:
        first = await anext(events)  # errors until here have a status of their own
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_stream(first, events, head, usage), media_type="text/event-stream")
    try:
        async for event in events:
            if isinstance(event, Done):
                message = {"role": "assistant", "content": event.text, "refusal": None}
                choice = {"index": 0, "message": message, "finish_reason": event.finish, "logprobs": None}
                body = {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(event)}
                return JSONResponse({**body, "evengaze": dict(event.info)})
    finally:
        await events.aclose()
    raise ClientGone


async def models(request: Request) -> dict[str, Any]:
    """The models there are: one."""
    return {"object": "list", "data": [await model(request.app.state.service.settings.model, request)]}


async def model(name: str, request: Request) -> dict[str, Any]:
    """A model, with the method that requests get if they name none."""
    service: Service = request.app.state.service
    if name != service.settings.model:
        raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "evengaze",
        "evengaze": service.methods.default.to_dict(),
    }


async def health(request: Request) -> Response:
    """200 while questions are answered, 503 otherwise."""
    alive = request.app.state.service.worker.alive
    return JSONResponse({"status": "ok" if alive else "the model's thread has ended"}, 200 if alive else 503)


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


# -- the answer's form -------------------------------------------------------------------------------------------------
async def _stream(
    first: Event, events: AsyncGenerator[Event, None], head: Mapping[str, Any], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the role, the text as it comes, why it ends, perhaps the usage; or an error in between."""

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _sse({**head, "object": _CHUNK, "choices": [choice], **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        event: Event | None = first
        while event is not None:
            if isinstance(event, Delta):
                yield chunk({"content": event.text})
            elif isinstance(event, Done):
                yield chunk({}, event.finish, evengaze=dict(event.info))
                if usage:
                    yield _sse({**head, "object": _CHUNK, "choices": [], "usage": _usage(event)})
            event = await anext(events, None)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _sse(error.body)
    except ClientGone:
        return
    finally:
        await events.aclose()


def _sse(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _usage(done: Done) -> dict[str, int]:
    total = done.prompt_tokens + done.completion_tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens, "total_tokens": total}


def _tell(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event to the loop that waits for it, if it still runs."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(queue.put_nowait, event)
