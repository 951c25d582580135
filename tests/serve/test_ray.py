"""`evengaze serve --ray` on this machine: two replicas, one killed under load; a front killed; one more.

Needs Ray (`make test-ray`). Only processes that this test has started are killed.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: `make test-ray` has an environment with it")
psutil = pytest.importorskip("psutil")

from evengaze.testing.clients import crowd, question  # noqa: E402
from serve.serving import ask, openai  # noqa: E402

pytestmark = pytest.mark.slow
METHODS = ({"method": "none"}, {"method": "fastv:keep=0.25"}, {"method": "pyramiddrop", "debias": "none"})


class Cluster:
    """A server on a Ray of its own, in processes below this one."""

    def __init__(self, process: Any, url: str) -> None:
        self.process, self.url = process, url

    def get(self, path: str, seconds: float = 20) -> str:
        return urllib.request.urlopen(f"{self.url}{path}", timeout=seconds).read().decode()

    def replicas(self) -> int:
        try:
            return json.loads(self.get("/health"))["replicas"]
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        """Summed over processes and labels."""
        return sum(float(value) for value in re.findall(rf"^evengaze_{name}{{.*}} (\S+)$", self.get("/metrics"), re.M))

    def processes(self, name: str) -> list[Any]:
        mine = self.process.children(recursive=True)
        return [one for one in mine if f"ServeReplica:evengaze:{name}" in " ".join(one.cmdline())]

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, **options)


def wait_for(what: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.5)
    return what()


@contextmanager
def cluster(tmp_path: Path, *options: str) -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "-m", "evengaze", "serve", "--model", "demo", "--ray", "--port", str(port)]
    with log.open("w") as output:
        started = subprocess.Popen([*command, "--ray-cpus", "0.5", *options], stdout=output, stderr=output)
    made = Cluster(psutil.Process(started.pid), f"http://127.0.0.1:{port}")
    try:
        assert wait_for(lambda: started.poll() is not None or made.replicas() > 0, 240), log.read_text()[-3000:]
        assert started.poll() is None, log.read_text()[-3000:]
        yield made
    finally:
        below = made.process.children(recursive=True)
        started.terminate()
        status = started.wait(90)
        _, left = psutil.wait_procs(below, 30)
        assert status == 0 and not left, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("two"), "--ray-replicas", "2", "--batch", "4") as made:
        assert wait_for(lambda: made.replicas() == 2)
        yield made


@pytest.fixture(scope="module")
def expected(predictor: Any) -> Callable[..., str]:
    from evengaze.serve.pruning import Methods
    from evengaze.serve.schema import Pruning

    methods, known = Methods(predictor, "fastv:keep=0.25", "auto"), {}

    def answer(scene: Any, text: str, pruning: dict[str, str]) -> str:
        key = (scene.name, text, str(pruning))
        if key not in known:
            inputs = predictor.inputs([predictor.ask(text, ["image"], "vicuna_v1")], {"images": [[scene.image]]})
            known[key] = predictor.complete(inputs, methods.of(Pruning(**pruning)), max_new_tokens=8)[0][0]
        return known[key]

    return answer


def work(scenes: Any, count: int) -> list[tuple[Any, str, dict[str, str]]]:
    return [
        (scene := scenes[number % 6], scene.questions[number % len(scene.questions)].text, METHODS[number % 3])
        for number in range(count)
    ]


def under_load(made: Cluster, asked: list[Any], retries: int, meanwhile: Callable[[], None]) -> list[Any]:
    """What 16 of OpenAI's clients are answered, while something happens once a quarter of the answers is there."""
    client, answered = made.client(max_retries=retries), []

    def one(case: Any) -> str:
        scene, text, pruning = case
        answer = ask(client, text, scene.image, evengaze=pruning).choices[0].message.content
        answered.append(answer)
        return answer

    with ThreadPoolExecutor(17) as pool:
        watching = pool.submit(lambda: (wait_for(lambda: len(answered) >= len(asked) // 4), meanwhile()))
        found = list(pool.map(one, asked))
        watching.result()
    return found


def test_the_application_is_the_same(two, scenes, expected):
    client, (scene, text, pruning) = two.client(max_retries=0), work(scenes, 2)[1]
    answer = ask(client, text, scene.image, evengaze=pruning)
    assert answer.choices[0].message.content == expected(scene, text, pruning)
    assert answer.model_extra["evengaze"]["visual_tokens"] == 196
    pieces = list(ask(client, text, scene.image, evengaze=pruning, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == expected(scene, text, pruning)
    with pytest.raises(openai.BadRequestError, match="unknown method"):
        ask(client, text, scene.image, evengaze={"method": "best"})
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "what?"}])
    assert client.models.list().data[0].id == "demo"


def test_both_replicas_answer_in_batches(two, scenes, expected):
    asked = work(scenes, 32)
    assert under_load(two, asked, 0, lambda: None) == [expected(*case) for case in asked]
    text = two.get("/metrics")
    counts = re.findall(r'^evengaze_requests_total{replica="(\w+)",status="200"} (\S+)$', text, re.M)
    assert len(counts) == 2 and min(float(count) for _, count in counts) >= 4
    assert two.metric("batch_size_sum") > two.metric("batch_size_count")


def test_a_replica_killed_under_load_loses_nothing(two, scenes, expected):
    """Not even without retries: what it had is answered by the other."""
    asked, resent = work(scenes, 96), two.metric("front_resent_total")
    victim = two.processes("model")[0]
    found = under_load(two, asked, 0, victim.kill)
    assert found == [expected(*case) for case in asked]
    assert not victim.is_running() and two.metric("front_resent_total") > resent
    print(f"sent again: {two.metric('front_resent_total') - resent:.0f} of {len(asked)}; none lost")
    assert wait_for(lambda: two.replicas() == 2)  # Ray has started another


def test_streams_end_with_an_error_or_an_answer(two, scenes):
    """A stream that had begun when its replica died cannot begin again; its client sees an error."""
    asked = work(scenes, 48)
    bodies = [question("demo", text, s.image, max_tokens=8, stream=True, evengaze=p) for s, text, p in asked]
    victim = two.processes("model")[0]
    with ThreadPoolExecutor(1) as pool:
        crowded = pool.submit(crowd, two.url, bodies, clients=16)
        time.sleep(2)
        victim.kill()
        outcomes = crowded.result()
    assert {outcome.status for outcome in outcomes} == {200}
    whole = [outcome for outcome in outcomes if outcome.text is not None]
    lost = two.metric("front_lost_total")
    assert len(whole) == len(outcomes) - lost
    print(f"streams: {len(whole)} whole, {lost:.0f} ended by an error event")
    assert wait_for(lambda: two.replicas() == 2)


def test_a_front_killed_under_load_is_retried_by_the_client(two, scenes, expected):
    """Ray's proxy answers 500 for what the front held; OpenAI's client asks again."""
    asked, victim = work(scenes, 48), two.processes("front")[0]
    assert under_load(two, asked, 5, victim.kill) == [expected(*case) for case in asked]
    assert not victim.is_running() and len(two.processes("front")) == 1


def test_random_disconnects_leave_nothing_behind(two, scenes, expected):
    asked = work(scenes, 40)
    bodies = [
        question("demo", t, s.image, max_tokens=8, stream=bool(n % 2), evengaze=p) for n, (s, t, p) in enumerate(asked)
    ]
    outcomes = crowd(two.url, bodies, clients=12, leaving=0.5, seed=5)
    for outcome, case in zip(outcomes, asked, strict=True):
        assert outcome.left or outcome.text == expected(*case), Counter(o.status for o in outcomes)
    names = ("front_requests_in_progress", "requests_in_progress", "queue_waiting", "batch_running")
    assert wait_for(lambda: not any(two.metric(name) for name in names), 30)


def test_load_brings_a_replica_more(tmp_path, scenes):
    with cluster(tmp_path, "--ray-replicas", "1:2", "--batch", "2") as made:
        assert made.replicas() == 1
        client, (scene, text, _) = made.client(), work(scenes, 1)[0]
        with ThreadPoolExecutor(12) as pool:
            deadline = time.monotonic() + 150

            def busy(_: int) -> None:
                while made.replicas() < 2 and time.monotonic() < deadline:
                    ask(client, text, scene.image)

            list(pool.map(busy, range(12)))
        assert made.replicas() == 2


def test_what_cannot_start_is_a_sentence(tmp_path):
    command = [sys.executable, "-m", "evengaze", "serve", "--ray", "--model", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("Error: the replicas cannot start: "), done.stderr[-2000:]
    assert str(tmp_path) in last


def test_an_application_of_a_config_files_arguments():
    from evengaze.errors import ConfigError
    from evengaze.serve.ray_serve import build

    made = build({"model": "demo", "method": "fastv:keep=128", "least": 2, "most": 8, "gpus": 1, "batch": 8})
    assert type(made).__name__ == "Application"
    with pytest.raises(ConfigError, match="unknown arguments: replicas"):
        build({"model": "demo", "replicas": 2})
