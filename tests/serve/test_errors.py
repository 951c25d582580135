"""What a client must not do, and how it is told: OpenAI's exceptions, one sentence each; the server goes on."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import pytest
import torch
from PIL import Image

from evengaze.errors import DataError
from serve.serving import ask, data_url, message, openai, serving


@pytest.fixture(scope="module")
def small(predictor):
    """A server with narrow limits."""
    with serving(predictor, body=300_000, pixels=200 * 200, images=2, new_tokens=16, context=700, queue=3) as running:
        yield running


def sentence(error):
    body = error.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body["message"]


def works(server, scenes):
    scene = scenes[0]
    answer = ask(server.client(), scene.questions[0].text, scene.image, max_tokens=8)
    return answer.choices[0].message.content == server.offline([scene.image], scene.questions[0].text, 8)


def broken_png():
    buffer = BytesIO()
    Image.effect_noise((90, 90), 80).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()[:2000]).decode()}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png;base64,%%%", "no base64"),
        ("data:image/png;base64," + base64.b64encode(b"just text").decode(), "no picture"),
        (broken_png(), "damaged"),
        ("data:text/plain,hello", "no picture"),
        ("data:nothing", "no comma"),
        ("file:///etc/passwd", "must begin with data:"),
        ("http://127.0.0.1:9/x.png", "fetches no pictures"),
        (data_url(Image.new("RGB", (201, 200))), "201 x 200 pixels"),
    ],
)
def test_bad_pictures(small, url, expected):
    with pytest.raises(openai.BadRequestError) as error:
        ask(small.client(), "what?", url)
    assert expected in sentence(error)
    assert error.value.code == "invalid_image"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"max_tokens": 17}, "up to 16"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"n": 2}, "n:"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"temperature": 3}, "temperature"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ["a"] * 5}, "four"),
        ({"evengaze": {"method": "fastvv"}}, "unknown method"),
        ({"evengaze": {"method": "antigravity:FastV"}}, "unknown method"),
        ({"evengaze": {"method": "/tmp/x.py:FastV"}}, "unknown method"),
        ({"evengaze": {"method": "fastv:keep=-3"}}, "keep"),
        ({"evengaze": {"method": "fastv:layer=99"}}, "99"),
        ({"evengaze": {"method": "pyramiddrop:layers=[2,10,20]"}}, "outside the model"),
        ({"evengaze": {"debias": "/etc/passwd.json"}}, "no file"),
        ({"evengaze": {"method": "fastv:debias=/etc/x.json"}}, "field of its own"),
        ({"evengaze": {"debias": "llava-9"}}, "no preset"),
        ({"evengaze": {"method": "none", "keep": 3}}, "no parameter keep"),
        ({"evengaze": {"methods": "none"}}, "evengaze.methods is not supported"),
    ],
)
def test_bad_fields(small, scenes, more, expected):
    with pytest.raises(openai.BadRequestError) as error:
        ask(small.client(), "what?", scenes[0].image, **more)
    assert expected in sentence(error)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages"),
        ([{"role": "assistant", "content": "no"}], "last message"),
        ([{"role": "system", "content": "be brief"}, {"role": "user", "content": "?"}], "no system messages"),
        ([{"role": "user", "content": "a <image> of what?"}], "takes for a picture"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "type"),
        ([{"role": "user", "content": []}], "no content"),
        ([{"role": "user", "content": "word " * 800}], "together at most 700"),
    ],
)
def test_bad_messages(small, messages, expected):
    with pytest.raises(openai.BadRequestError) as error:
        small.client().chat.completions.create(model="demo", messages=messages, max_tokens=4)
    assert expected in sentence(error)


def test_too_many_pictures_and_too_long_prompts(small, scenes):
    with pytest.raises(openai.BadRequestError) as error:
        ask(small.client(), "what?", *[scenes[0].image] * 3)
    assert "at most 2" in sentence(error)


@pytest.mark.parametrize("times", [2, 9])
def test_a_body_that_is_too_large(small, times):
    with pytest.raises(openai.APIStatusError) as error:
        ask(small.client(), "x" * 300_000 * times)
    assert error.value.status_code == 413 and "300,000 bytes" in sentence(error)


def test_other_models_paths_and_bodies(small):
    with pytest.raises(openai.NotFoundError) as error:
        small.client().chat.completions.create(model="gpt-4o", messages=[message("?")])
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as error:
        small.client().embeddings.create(model="demo", input="x")
    assert "/v1/embeddings" in sentence(error)
    with pytest.raises(openai.NotFoundError):
        small.client().models.retrieve("other")
    request = urllib.request.Request(
        f"{small.url}/v1/chat/completions", b"{not json", {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400 and "JSON" in json.load(refused.value)["error"]["message"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{small.url}/v1/chat/completions")
    assert refused.value.code == 405 and refused.value.headers["Allow"] == "POST"


def test_one_bad_request_does_not_take_its_batch_with_it(predictor, scenes):
    """All four wait for one batch; one is too long for the model."""
    with serving(predictor, batch=4, wait=5, context=600) as server:
        found = {}

        def one(number):
            try:
                question = "word " * 500 if number == 2 else scenes[number].questions[0].text
                found[number] = ask(server.client(), question, scenes[number].image, max_tokens=8)
            except openai.BadRequestError as error:
                found[number] = error

        threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found[2].code == "context_length_exceeded"
        for number in (0, 1, 3):
            expected = server.offline([scenes[number].image], scenes[number].questions[0].text, 8)
            assert found[number].choices[0].message.content == expected


def test_what_the_model_refuses_of_one_is_answered_to_the_others(predictor, scenes, monkeypatch):
    """All four wait for one batch, which the model refuses for the sake of one."""
    asked = [(scene.questions[0].text, scene.image) for scene in scenes[:4]]
    asked[2] = ("what is cursed?", scenes[2].image)

    def complete(inputs, *args, **options):
        if any("cursed" in text for text in predictor.processor.tokenizer.batch_decode(inputs["input_ids"])):
            raise DataError("this picture cannot be pruned")
        return type(predictor).complete(predictor, inputs, *args, **options)

    with serving(predictor, batch=4, wait=5) as server:
        expected = [server.offline([image], text, 8) for text, image in asked]

        def one(case):
            try:
                return ask(server.client(), *case).choices[0].message.content
            except openai.BadRequestError as error:
                return error.response.json()["error"]["message"]

        with monkeypatch.context() as patched, ThreadPoolExecutor(4) as pool:
            patched.setattr(predictor, "complete", complete)
            found = list(pool.map(one, asked))
        assert found == [*expected[:2], "this picture cannot be pruned", expected[3]]


def test_a_full_queue_is_said_so_at_once(small, scenes):
    held = [socket.create_connection(("127.0.0.1", int(small.url.rpartition(":")[2]))) for _ in range(3)]
    for connection in held:  # bodies that never end hold places
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
    while small.metric("requests_in_progress") < 3:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError) as error:
        ask(small.client(), "what?", scenes[0].image)
    assert error.value.code == "queue_full" and error.value.response.headers["Retry-After"] == "1"
    for connection in held:
        connection.close()
    assert small.idle()
    assert works(small, scenes)


def test_a_request_that_takes_too_long(predictor, scenes):
    with serving(predictor, seconds=1.0, wait=5.0, batch=9) as server:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as error:
                ask(server.client(), "what?", scenes[0].image, stream=stream)
            assert error.value.status_code == 504 and error.value.code == "timeout"
        assert server.idle()


def test_a_failing_model_is_an_error_and_no_end(predictor, scenes, monkeypatch):
    with serving(predictor) as server:
        complete = predictor.complete
        monkeypatch.setattr(predictor, "complete", lambda *a, **k: 1 / 0)
        with pytest.raises(openai.InternalServerError) as error:
            ask(server.client(), "what?", scenes[0].image)
        assert error.value.code == "internal_error" and "division" not in sentence(error)
        monkeypatch.setattr(predictor, "complete", complete)
        assert works(server, scenes)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_exhausted_memory_is_said_whoever_ran_out_of_it(predictor, scenes, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    with serving(predictor) as server:
        with monkeypatch.context() as patched:
            patched.setattr(predictor, "complete", exhausted)
            with pytest.raises(openai.InternalServerError) as refused:
                ask(server.client(), "what?", scenes[0].image)
        assert refused.value.status_code == 503 and refused.value.code == "out_of_memory"
        assert works(server, scenes)


def test_keys(predictor, scenes):
    with serving(predictor, key="secret") as server:
        with pytest.raises(openai.AuthenticationError):
            ask(server.client(), "what?", scenes[0].image)
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        assert ask(server.client(api_key="secret"), "what?", scenes[0].image, max_tokens=2).choices
        assert urllib.request.urlopen(f"{server.url}/health").status == 200
        assert "secret" not in repr(server.settings)


def test_pictures_from_allowed_hosts_only(predictor, scenes):
    scene = scenes[0]
    data = base64.b64decode(data_url(scene.image).partition(",")[2])
    asked = []

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("Location", "/x.png")
            self.end_headers()
            self.wfile.write(b"" if moved else data * (1000 if self.path == "/large" else 1))

        def log_message(self, *args):
            pass

    host = HTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{host.server_port}"
    try:
        with serving(predictor, hosts=("127.0.0.1",), body=1_000_000) as server:
            answer = ask(server.client(), scene.questions[0].text, f"{address}/x.png")
            assert answer.choices[0].message.content == server.offline([scene.image], scene.questions[0].text)
            for path in ("/x.png?signed=a?", "/x.png?", "/x.png?b"):
                ask(server.client(), "what?", address + path, max_tokens=1)
            assert asked[1:] == ["/x.png?signed=a?", "/x.png", "/x.png?b"]
            for path, expected in (("/large", "1,000,000 bytes"), ("/moved", "answered 302")):
                with pytest.raises(openai.BadRequestError) as error:
                    ask(server.client(), "what?", address + path)
                assert expected in sentence(error)
            with pytest.raises(openai.BadRequestError) as error:
                ask(server.client(), "what?", f"http://localhost:{host.server_port}/x.png")
            assert "from 'localhost'" in sentence(error)
        with serving(predictor, hosts=("*",)) as server:
            for name in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1"):
                with pytest.raises(openai.BadRequestError) as error:
                    ask(server.client(), "what?", f"http://{name}:{host.server_port}/x.png")
                assert "no public address" in sentence(error)
    finally:
        host.shutdown()
        host.server_close()


def test_an_error_of_ours_is_not_counted_as_a_client_that_left(predictor, scenes, monkeypatch):
    with serving(predictor) as server:

        async def fails(*_):
            raise ZeroDivisionError

        with monkeypatch.context() as patched:
            patched.setattr(server.app.state.service, "job", fails)
            with pytest.raises(openai.InternalServerError) as error:
                ask(server.client(), "what?")
            assert "its log says why" in sentence(error)
        assert server.metric("requests_total", status="500") == 1
        assert server.metric("disconnects_total") == server.metric("requests_total", status="499") == 0
        assert works(server, scenes)


def test_a_budget_of_one_token_is_no_share(server):
    from evengaze.serve.schema import Pruning

    for method, sent, kept in (
        ("pyramiddrop", "[64, 16, 1]", [64, 16, 1]),
        ("pyramiddrop", "[64, 16, 1.0]", [64, 16, 196]),
        ("fastv", "1.0", [196]),
        ("fastv", "1", [1]),
    ):
        asked = Pruning.model_validate_json(f'{{"method": "{method}", "keep": {sent}}}')
        pruner = server.app.state.service.methods.of(asked)
        assert [pruner.budget(stage, 196, 196) for stage in range(len(kept))] == kept


def test_models_health_and_metrics(server, scenes):
    assert works(server, scenes)
    models = server.client().models.list().data
    assert [m.id for m in models] == ["demo"] and models[0].model_extra["evengaze"]["method"] == "fastv"
    assert json.load(urllib.request.urlopen(f"{server.url}/health")) == {"status": "ok"}
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    for name in ("visual_tokens_before_total", "visual_tokens_after_total", "kv_bytes_total", "prefill_seconds_count"):
        assert f'evengaze_{name}{{method="fastv"}}' in text
    assert "evengaze_queue_waiting 0.0" in text
    assert (
        0
        < server.metric("visual_tokens_after_total", method="fastv")
        < server.metric("visual_tokens_before_total", method="fastv")
    )
