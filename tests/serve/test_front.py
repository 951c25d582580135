"""What a front does with replicas that die, stall or stream; and the settings of a server on Ray. Needs no Ray."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from evengaze.errors import ConfigError
from serve.serving import ModelSpec

front = pytest.importorskip("evengaze.serve.front")
from evengaze.serve.asgi import messages  # noqa: E402
from evengaze.serve.metrics import labelled  # noqa: E402
from evengaze.serve.ray_serve import Scale  # noqa: E402
from evengaze.serve.settings import Limits, Settings  # noqa: E402

HEAD = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/chat/completions",
    "query_string": b"",
    "headers": [],
    "client": ("127.0.0.1", 1),
}


class Died(Exception):
    """As Ray says it."""


def start(status: int = 200, kind: bytes = b"application/json") -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def piece(text: str, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


STREAM = start(kind=b"text/event-stream; charset=utf-8")


class Replicas:
    """Answers by a script for each request: messages, a class to raise, or None to stall for ever."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.cancelled, self.asked = list(scripts), 0, []
        self.stalled = asyncio.Event()

    def answer(self, head: dict[str, Any], body: bytes) -> Any:
        self.asked.append((head["path"], body))
        script = self.scripts.pop(0)
        replicas = self

        class Answer:
            async def __aiter__(self) -> Any:
                for step in script:
                    if step is None:
                        replicas.stalled.set()
                        await asyncio.Event().wait()
                    if isinstance(step, type):
                        raise step("the actor is dead")
                    yield step

            def cancel(self) -> None:
                replicas.cancelled += 1

        return Answer()


async def nowhere(method: str) -> tuple[list[Any], list[Any]]:
    return [], []


def ask(replicas: Replicas, *, leaves: bool = False, everywhere: Any = nowhere, **changes: Any) -> Any:
    """Status, headers and body of an answer by a front; None as status if it sent no head.

    A client that `leaves` does so when its replica stalls.
    """
    path, method = changes.pop("path", HEAD["path"]), changes.pop("method", "POST")
    key = changes.pop("key", None)
    settings = Settings(ModelSpec("demo"), limits=Limits(**{"seconds": 5.0, **changes}), key=key)
    app = front.build_front(settings, replicas.answer, everywhere, (Died,))

    async def once() -> list[Any]:
        async with app.router.lifespan_context(app):
            found = []

            async def read() -> None:
                async for message in messages(app, {**HEAD, "path": path, "method": method}, b"{}"):
                    found.append(message)

            reading = asyncio.create_task(read())
            if leaves:
                await replicas.stalled.wait()
                reading.cancel()
                await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=30)
            else:
                await reading
            return found

    found = asyncio.run(once())
    body = b"".join(m["body"] for m in found if m["type"] == "http.response.body").decode()
    head = next((m for m in found if m["type"] == "http.response.start"), None)
    return (None, {}, body) if head is None else (head["status"], dict(head["headers"]), body)


@pytest.mark.parametrize("script", [[Died], [start(), Died]], ids=["before its head", "after its head"])
@pytest.mark.parametrize("times", [1, 2])
def test_what_a_replica_dies_on_is_answered_by_another(script, times):
    resent = front.METRICS.resent._value.get()
    replicas = Replicas(*[script] * times, [start(201), piece("{}")])
    assert ask(replicas)[::2] == (201, "{}")
    assert replicas.asked == [(HEAD["path"], b"{}")] * (times + 1)
    assert front.METRICS.resent._value.get() == resent + times
    assert replicas.cancelled == times + 1  # nothing goes on in the dark


def test_a_request_that_kills_every_replica_is_given_back():
    replicas = Replicas(*[[Died]] * 3)
    status, headers, body = ask(replicas)
    assert status == 503 and headers[b"retry-after"] == b"1"
    assert json.loads(body)["error"]["code"] == "replica_died"
    assert not replicas.scripts


def test_a_stream_that_has_begun_ends_with_an_error():
    replicas = Replicas([STREAM, piece("data: 1\n\n", True), Died])
    status, _, body = ask(replicas)
    first, second = body.strip().split("\n\n")
    assert status == 200 and first == "data: 1"
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == "replica_died"


def test_errors_of_the_replica_are_passed_on():
    assert ask(Replicas([start(404), piece("none")]))[::2] == (404, "none")


@pytest.mark.parametrize("script", [[None], [start(), None]])
def test_a_replica_that_stalls_is_late(script):
    replicas = Replicas(script)
    status, _, body = ask(replicas, seconds=0.3)
    assert status == 504 and "0.3 seconds" in json.loads(body)["error"]["message"]
    assert replicas.cancelled == 1


def test_a_client_that_goes_away_cancels_its_answer():
    replicas, left = Replicas([None]), front.METRICS.left._value.get()
    assert ask(replicas, leaves=True)[0] is None
    assert replicas.cancelled == 1 and front.METRICS.left._value.get() == left + 1
    assert front.METRICS.places._value.get() == 0


def test_who_has_left_is_counted_before_the_place_is_free(monkeypatch):
    """Whoever sees a server that holds nothing finds all of it counted."""
    seen, left = [], front.METRICS.left._value.get
    monkeypatch.setattr(front.METRICS.places, "set", lambda taken: seen.append((taken, left())))
    before = left()
    ask(Replicas([None]), leaves=True)
    assert seen == [(1, before), (0, before + 1)]


def test_the_gate_stands_in_front():
    replicas = Replicas()
    assert ask(replicas, key="secret")[0] == 401
    assert ask(replicas, body=1)[0] == 413
    assert ask(replicas, path="/elsewhere")[0] == 404
    assert not replicas.asked


@pytest.mark.parametrize(("alive", "expected"), [([True, True], 200), ([True, False], 200), ([False], 503), ([], 503)])
def test_health_is_that_of_the_replicas(alive, expected):
    async def everywhere(method):
        assert method == "alive"
        return [True], alive

    status, _, body = ask(Replicas(), path="/health", method="GET", everywhere=everywhere)
    assert status == expected and json.loads(body)["replicas"] == sum(alive)


def test_metrics_of_all_processes_are_one_text():
    def text(**counts):
        from evengaze.serve.metrics import Metrics

        made = Metrics()
        for method, count in counts.items():
            made.before.labels(method).inc(count)
        from prometheus_client import generate_latest

        return generate_latest(made.registry).decode()

    async def everywhere(method):
        return [("f", front.front_text())], [("a", text(fastv=3)), ("b", text(fastv=4, tome=1))]

    _, headers, body = ask(Replicas(), path="/metrics", method="GET", everywhere=everywhere)
    assert headers[b"content-type"].startswith(b"text/plain")
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(body)}
    samples = {
        (s.labels["replica"], s.labels["method"]): s.value
        for s in families["evengaze_visual_tokens_before"].samples
        if s.name.endswith("_total")
    }
    assert samples == {("a", "fastv"): 3, ("b", "fastv"): 4, ("b", "tome"): 1}
    assert body.count("# TYPE evengaze_visual_tokens_before_total counter") == 1


def test_labels_with_braces_and_quotes_survive():
    text = '# HELP x y\n# TYPE x counter\nx{why="a } b"} 1.0\nx 2.0\n'
    assert labelled({"one": text}).splitlines()[2:] == ['x{replica="one",why="a } b"} 1.0', 'x{replica="one"} 2.0']


def test_scales():
    assert Scale.parse("2") == Scale(2, 2) and Scale.parse("1:4", cpus=0.5) == Scale(1, 4, cpus=0.5)
    assert [str(Scale.parse(text)) for text in ("1", "3", "1:4")] == ["1 replica", "3 replicas", "1 to 4 replicas"]
    for wrong in ("0", "4:1", "two", "1:2:3", ":"):
        with pytest.raises(ConfigError, match="replicas: give a number"):
            Scale.parse(wrong)
    with pytest.raises(ConfigError, match="CPUs"):
        Scale(cpus=0)
