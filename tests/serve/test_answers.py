"""The server under OpenAI's own client: every answer is the one that the model gives without a server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.serving import ask, message, serving

METHODS = [
    {"method": "none"},
    {"method": "fastv:keep=0.25"},
    {"method": "fastv", "keep": 32, "debias": "none"},
    {"method": "pyramiddrop"},
    {"method": "sparsevlm", "debias": "padding"},
    {"method": "random:keep=0.5"},
    {},
]


def text(answer):
    return answer.choices[0].message.content


def test_a_picture_and_a_method_for_each_request(server, scenes):
    client = server.client()
    scene = scenes[0]
    for pruning in METHODS:
        question = scene.questions[0].text
        answer = ask(client, question, scene.image, evengaze=pruning)
        assert text(answer) == server.offline([scene.image], question, **pruning)
        assert answer.choices[0].finish_reason == "stop"
        info = answer.model_extra["evengaze"]
        assert info["visual_tokens"] == 196
        assert (info["average_tokens"] == 196) == (pruning.get("method") == "none")
        assert info["kv_bytes"] <= info["kv_bytes_unpruned"]
        assert answer.usage.prompt_tokens > 196 and answer.usage.completion_tokens >= 1


def test_text_without_a_picture(server):
    answer = ask(server.client(), "what color is the star?", max_tokens=4)
    assert text(answer) == server.offline([], "what color is the star?", 4)


def test_two_pictures(server, scenes):
    pictures, question = [scenes[1].image, scenes[2].image], scenes[1].questions[0].text
    answer = ask(server.client(), question, *pictures)
    assert text(answer) == server.offline(pictures, question)
    assert answer.model_extra["evengaze"]["visual_tokens"] == 392


def test_a_stream_is_the_answer_in_pieces(server, scenes):
    scene = scenes[3]
    question = scene.questions[0].text
    pieces = list(ask(server.client(), question, scene.image, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == server.offline(
        [scene.image], question
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage.completion_tokens >= 1
    assert pieces[-2].choices[0].finish_reason == "stop"


def test_max_tokens_and_stop_strings_end_an_answer(server, scenes):
    scene = scenes[0]
    question = scene.questions[0].text
    whole = server.offline([scene.image], question)
    cut = ask(server.client(), question, scene.image, max_tokens=1)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 1
    stopped = ask(server.client(), question, scene.image, stop=[whole[1:]])
    assert text(stopped) == whole[:1] and stopped.choices[0].finish_reason == "stop"


def test_sampling_repeats_with_its_seed(server, scenes):
    scene = scenes[0]
    asked = {"temperature": 2.0, "max_tokens": 8, "evengaze": {"method": "random:keep=0.1"}}
    found = [text(ask(server.client(), scene.questions[0].text, scene.image, seed=s, **asked)) for s in (5, 5, 6, 7)]
    assert found[0] == found[1] and len(set(found)) > 1


def test_sixteen_clients_at_once_with_different_methods(server, scenes):
    def one(number):
        scene, pruning = scenes[number % 8], METHODS[number % len(METHODS)]
        question = scene.questions[number % len(scene.questions)].text
        answer = ask(server.client(), question, scene.image, evengaze=pruning)
        return (text(answer), answer.model_extra["evengaze"]["batch"]), (scene, question, pruning)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(16)))
    for (answer, _), (scene, question, pruning) in found:
        assert answer == server.offline([scene.image], question, **pruning)
    assert max(batch for (_, batch), _ in found) > 1  # they were answered together
    assert server.idle()


def test_what_a_processor_does_not_take_together_is_answered_apart(predictor, scenes, monkeypatch):
    """As pictures of unlike sizes, where a processor stacks them."""
    encoded = []

    def inputs(texts, media, **options):
        encoded.append(len(texts))
        if len(texts) > 1:
            raise ValueError("unlike pictures")
        return type(predictor).inputs(predictor, texts, media, **options)

    with serving(predictor, batch=4, wait=2.0, seconds=30) as server:
        asked = [(scene.questions[0].text, scene.image) for scene in scenes[:4]]
        expected = [server.offline([image], question) for question, image in asked]
        monkeypatch.setattr(predictor, "inputs", inputs)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda one: text(ask(server.client(timeout=20), *one)), asked))
        assert max(encoded) > 1 and len(encoded) < 20
        assert answers == expected


def test_several_turns_take_the_models_template(server, scenes):
    scene = scenes[0]
    turns = [
        message(scene.questions[0].text, scene.image),
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": scene.questions[1].text},
    ]
    answer = server.client().chat.completions.create(model="demo", messages=turns, max_tokens=8)
    assert answer.model_extra["evengaze"]["visual_tokens"] == 196
    predictor, _ = server.predictor, server.idle()
    prompt = (
        f"<|im_start|>User:<image>\n{scene.questions[0].text}\nAssistant: red<|im_end|>"
        f"<|im_start|>User:\n{scene.questions[1].text}\nAssistant:"
    )
    inputs = predictor.inputs([prompt], {"images": [[scene.image]]})
    pruner = server.app.state.service.methods.default
    assert text(answer) == predictor.complete(inputs, pruner, max_new_tokens=8)[0][0]


@pytest.mark.slow
def test_batches_are_faster_than_one_at_a_time(predictor, scenes):
    """Loose: a busy machine is no reason to fail. `benchmarks/serving.py` gives the figures."""
    with serving(predictor, batch=8) as together:

        def one(number):
            return ask(together.client(), scenes[number % 8].questions[0].text, scenes[number % 8].image)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(16)))
        assert together.metric("batch_size_count") < 16
