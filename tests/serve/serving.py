"""A server in a thread of the test's process, and what its clients send."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import pytest

from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.serve.settings import Limits, Settings

WHY = "the server's packages are not installed: pip install 'evengaze[serve,judge]'"
openai = pytest.importorskip("openai", reason=WHY)
uvicorn = pytest.importorskip("uvicorn", reason=WHY)
for package in ("fastapi", "prometheus_client"):
    pytest.importorskip(package, reason=WHY)


@dataclass
class Running:
    """A server in a thread of this process."""

    app: Any
    url: str
    predictor: Predictor
    settings: Settings
    _client: Any = None

    def client(self, **options: Any) -> Any:
        if self._client is None:
            self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        return self._client.with_options(**options) if options else self._client

    def offline(self, images: list[Any], question: str, new_tokens: int = 8, **pruning: Any) -> str:
        """What the same model answers without a server, alone."""
        from evengaze.serve.pruning import Methods
        from evengaze.serve.schema import Pruning

        assert self.idle()  # an answer is sent before the model is let go of
        pruner = Methods(self.predictor, self.settings.method, self.settings.debias).of(Pruning(**pruning))
        text = self.predictor.ask(question, ["image"] * len(images), "vicuna_v1")
        inputs = self.predictor.inputs([text], {"images": [images]} if images else {})
        return self.predictor.complete(inputs, pruner, max_new_tokens=new_tokens)[0][0]

    def metric(self, name: str, **labels: str) -> float:
        return self.app.state.metrics.registry.get_sample_value(f"evengaze_{name}", labels) or 0.0

    def idle(self, seconds: float = 20) -> bool:
        """Whether the server comes to hold no request."""
        end = time.monotonic() + seconds
        names = ("requests_in_progress", "queue_waiting", "batch_running")
        while any(self.metric(name) for name in names) and time.monotonic() < end:
            time.sleep(0.02)
        return not any(self.metric(name) for name in names)


@contextmanager
def serving(predictor: Predictor, **changes: Any) -> Iterator[Running]:
    from evengaze.serve.app import build_app

    limits = Limits(**{k: v for k, v in changes.items() if hasattr(Limits, k)})
    others = {k: v for k, v in changes.items() if not hasattr(Limits, k)}
    settings = replace(Settings(ModelSpec("demo"), limits=limits), **others)
    app = build_app(settings, predictor)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(app, f"http://127.0.0.1:{port}", predictor, settings)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def data_url(image: Any, form: str = "PNG") -> str:
    buffer = BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def message(question: str, *images: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": i if isinstance(i, str) else data_url(i)}} for i in images]
    return {"role": "user", "content": [{"type": "text", "text": question}, *parts]}


def ask(client: Any, question: str, *images: Any, evengaze: dict[str, Any] | None = None, **more: Any) -> Any:
    extra = {} if evengaze is None else {"extra_body": {"evengaze": evengaze}}
    more = {"max_tokens": 8, **more, **extra}
    return client.chat.completions.create(model="demo", messages=[message(question, *images)], **more)
