"""Several users of one explorer at once: what each sees is what its own settings give."""

from __future__ import annotations

import base64
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from evengaze import demo
from evengaze.errors import LayoutError
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.explore import draw
from evengaze.explore.findings import Choice, Explorer

gradio_client = pytest.importorskip("gradio_client", reason="Gradio is not installed: see `make test-explore`")

SETTINGS = [
    ("fastv", 25, 2, "both"),
    ("fastv", 10, 5, "padding"),
    ("fastv", 40, 1, "trend"),
    ("pyramiddrop", 30, 2, "both"),
    ("sparsevlm", 50, 2, "both"),
    ("random", 20, 3, "both"),
    ("tokencarve", 25, 2, "both"),
    ("himap", 35, 2, "padding"),
]


def test_eight_clients_with_different_settings(page):
    explorer = Explorer(Predictor.load(ModelSpec("demo")))
    scenes = demo.make_dataset("eval", 6)

    def one(number):
        client = gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False)
        name = f"picture {number % 6 + 1}"
        found = []
        for turn in range(2):  # the second time with another user's settings
            settings = SETTINGS[(number + turn) % len(SETTINGS)]
            client.predict(name, api_name="/choose")
            question = scenes[number % 6].questions[turn].text
            found.append((settings, question, client.predict(question, *settings, api_name="/find")))
        return found

    with ThreadPoolExecutor(8) as pool:
        every = list(pool.map(one, range(8)))
    for number, rounds in enumerate(every):
        for (method, keep, layer, steps), question, shown in rounds:
            expected = explorer.find(scenes[number % 6].image, question, Choice(method, keep / 100, layer, steps))
            runs = (expected.dense, expected.plain, expected.debiased)
            for html, run in zip(shown[:3], runs, strict=True):
                if run is None:
                    assert "nothing to debias" in html
                    continue
                assert f"<p class='eg-answer'>{run.answer}</p>" in html
                assert f"<td>{run.trace.average_tokens():.1f}</td>" in html
                kept = [len(stage.rows[0].kept) for stage in run.trace.stages]
                assert [int(n) for n in re.findall(r"<figcaption>before layer \d+: (\d+) of", html)] == kept
            assert question in shown[5] and f"picture {number % 6 + 1}" in shown[5]


def test_what_the_page_would_not_send_is_refused(page):
    client = gradio_client.Client(page.local_url, verbose=False)
    with pytest.raises(Exception, match=r"os:path|not in the list|choices"):
        client.predict("what?", "os:path", 25, 2, "both", api_name="/find")
    with pytest.raises(Exception, match=r"minimum|below|greater|less"):
        client.predict("what?", "fastv", -5, 2, "both", api_name="/find")
    shown = client.predict("a <image>?", "fastv", 25, 2, "both", api_name="/find")
    assert "role='alert'" in shown[5]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "Memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "Memory ran out"),
        (LayoutError("the picture has no grid"), "The picture has no grid"),
        (ZeroDivisionError("division"), "the terminal says why"),
    ],
)
@pytest.mark.parametrize("where", [(Explorer, "find"), (draw, "panel")], ids=["model", "drawing"])
def test_whatever_fails_is_a_sentence(page, monkeypatch, where, error, expected):
    client = gradio_client.Client(page.local_url, verbose=False)

    def fails(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(*where, fails)
        said = client.predict("what?", "fastv", 25, 2, "both", api_name="/find")[5]
    assert "role='alert'" in said and expected in said and "division" not in said
    assert "eg-answer" in client.predict("what?", "fastv", 25, 2, "both", api_name="/find")[0]


def test_it_listens_here_only_and_asks_nobody(page):
    assert page.local_url.startswith("http://127.0.0.1:")
    assert page.share_url is None
    from urllib.request import urlopen

    text = urlopen(page.local_url).read().decode()
    assert not re.findall(r"https?://(?:fonts|cdn|huggingface)[^\"']+\.(?:js|css|woff2?)", text)


def test_an_upload_of_text_is_a_sentence(page, tmp_path):
    client = gradio_client.Client(page.local_url, verbose=False)
    path = tmp_path / "notes.png"
    path.write_text("no picture at all")
    shown = client.predict(gradio_client.handle_file(str(path)), api_name="/upload")
    assert "This is no picture that can be read" in shown[-1]
    assert base64.b64encode(b"no picture").decode() not in shown[-1]
