"""Clients that go away: their place is free again, and nobody else's answer suffers."""

from __future__ import annotations

import threading

from evengaze.testing.clients import ask_and_leave, crowd, question
from serve.serving import ask, serving

METHODS = ({"method": "none"}, {"method": "fastv:keep=0.25"}, {"method": "pyramiddrop", "debias": "none"}, {})


def bodies_of(scenes, count):
    """Requests, and what each is about."""
    asked = []
    for number in range(count):
        scene = scenes[number % 6]
        text = scene.questions[number % len(scene.questions)].text
        asked.append((scene, text, METHODS[number % len(METHODS)]))
    bodies = [
        question("demo", text, scene.image, max_tokens=8, stream=bool(number % 2), evengaze=pruning)
        for number, (scene, text, pruning) in enumerate(asked)
    ]
    return bodies, asked


def lasting_threads():
    """All but those of the event loop's pool, which decode pictures: as many as the machine has cores, and more."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


def test_random_disconnects_leave_nothing_behind(server, scenes):
    bodies, asked = bodies_of(scenes, 24)
    before, threads = server.metric("disconnects_total"), lasting_threads()
    outcomes = crowd(server.url, bodies, clients=12, leaving=0.5, seed=3)
    assert server.idle()
    stayed = [(o, a) for o, a in zip(outcomes, asked, strict=True) if not o.left]
    assert 6 <= len(stayed) <= 18
    known = {}
    for outcome, (scene, text, pruning) in stayed:
        key = (scene.name, text, str(pruning))
        known[key] = known.get(key) or server.offline([scene.image], text, **pruning)
        assert outcome.text == known[key]
    assert server.metric("disconnects_total") > before
    assert lasting_threads() == threads
    assert ask(server.client(), asked[0][1], asked[0][0].image).choices


def test_who_leaves_while_waiting_is_never_answered(predictor, scenes):
    """The model is busy waiting for others of a batch; the client leaves; its job is gone before a batch begins."""
    with serving(predictor, wait=3.0, batch=2) as server:
        ask_and_leave(server.url, question("demo", "what?", scenes[0].image), 0.5)
        assert server.idle(2.5)  # not at the end of the wait: at once
        assert server.metric("batch_size_count") == 0


def test_a_row_that_nobody_waits_for_ends(predictor, scenes, monkeypatch):
    """The others of its batch go on; the batch does not go on for it alone."""
    with serving(predictor, new_tokens=1000) as server:
        service = server.app.state.service
        monkeypatch.setattr(service.worker, "_ends", frozenset())  # an answer that does not end by itself
        monkeypatch.setattr(predictor.model.generation_config, "eos_token_id", None)
        body = question("demo", "what?", scenes[0].image, max_tokens=1000, stream=True)
        ask_and_leave(server.url, body, 2.0)
        assert server.idle(30)
        assert server.metric("completion_tokens_total") == 0  # 1000 tokens were not made
        assert server.metric("disconnects_total") + server.metric("requests_total", status="200") == 1
