"""The server under load: 500 requests with random disconnects, and requests a second in batches and one at a time.

python benchmarks/serving.py --part disconnects
python benchmarks/serving.py --part throughput
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from evengaze import demo
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.serve.pruning import Methods
from evengaze.serve.schema import Pruning
from evengaze.testing.clients import crowd, question

METHODS = (
    {"method": "none"},
    {"method": "fastv:keep=0.25"},
    {"method": "fastv:keep=0.125", "debias": "none"},
    {"method": "pyramiddrop"},
    {"method": "random:keep=0.25"},
)


@contextmanager
def served(*options: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "evengaze", "serve", "--model", "demo", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with status {process.returncode}") from None
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def metrics(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return {name: float(value) for name, value in re.findall(r"^evengaze_(\S+) (\S+)$", text, re.MULTILINE)}


def memory(pid: int) -> float:
    """Resident memory in MB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def bodies_of(count: int, methods: tuple[dict[str, str], ...] = METHODS) -> tuple[list[dict], list[tuple]]:
    scenes = demo.make_dataset("eval", 20)
    asked = []
    for number in range(count):
        scene = scenes[number % len(scenes)]
        one = scene.questions[number // len(scenes) % len(scene.questions)]
        asked.append((scene, one.text, methods[number % len(methods)]))
    bodies = [
        question("demo", text, scene.image, max_tokens=8, stream=bool(number % 3 == 0), evengaze=pruning)
        for number, (scene, text, pruning) in enumerate(asked)
    ]
    return bodies, asked


def disconnects(count: int, clients: int) -> int:
    bodies, asked = bodies_of(count)
    predictor = Predictor.load(ModelSpec("demo"))
    methods = Methods(predictor, "fastv:keep=0.25", "auto")
    known: dict[tuple, str] = {}
    for scene, text, pruning in asked:
        key = (scene.name, text, str(pruning))
        if key not in known:
            inputs = predictor.inputs([predictor.ask(text, ["image"], "vicuna_v1")], {"images": [[scene.image]]})
            known[key] = predictor.complete(inputs, methods.of(Pruning(**pruning)), max_new_tokens=8)[0][0]
    print(f"{len(known)} different questions answered offline")
    wrong = 0
    with served() as (url, pid):
        sizes = []
        rounds = 5
        for turn in range(rounds):
            part = slice(turn * count // rounds, (turn + 1) * count // rounds)
            outcomes = crowd(url, bodies[part], clients=clients, leaving=0.5, seed=turn)
            for outcome, (scene, text, pruning) in zip(outcomes, asked[part], strict=True):
                wrong += not outcome.left and outcome.text != known[scene.name, text, str(pruning)]
            for _ in range(300):
                found = metrics(url)
                held = found["requests_in_progress"] + found["queue_waiting"] + found["batch_running"]
                if not held:
                    break
                time.sleep(0.1)
            sizes.append(memory(pid))
            left = sum(outcome.left for outcome in outcomes)
            print(
                f"round {turn}: {len(outcomes)} requests, {left} left; statuses "
                f"{dict(Counter(o.status for o in outcomes if not o.left))}; wrong so far {wrong}; held {held:.0f}; "
                f"{sizes[-1]:.0f} MB, {threads(pid)} threads; disconnects seen {found['disconnects_total']:.0f}",
                flush=True,
            )
    return int(wrong > 0 or held > 0)


def throughput(count: int) -> int:
    bodies, _ = bodies_of(count, ({"method": "fastv:keep=0.25"},))
    rates: dict[str, list[float]] = {}
    plans = {"one at a time": (1, "1"), "16 clients, no batches": (16, "1"), "16 clients, batches of 8": (16, "8")}
    for name, (clients, batch) in plans.items():
        with served("--batch", batch) as (url, _):
            crowd(url, bodies[:8], clients=clients)
            for _ in range(3):
                start = time.perf_counter()
                outcomes = crowd(url, bodies, clients=clients)
                rates.setdefault(name, []).append(len(outcomes) / (time.perf_counter() - start))
                assert all(outcome.status == 200 for outcome in outcomes)
        print(
            f"{name}: {median(rates[name]):.2f} requests/s (of {', '.join(f'{r:.2f}' for r in rates[name])})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("disconnects", "throughput"), required=True)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--clients", type=int, default=16)
    given = parser.parse_args()
    if given.part == "disconnects":
        sys.exit(disconnects(given.requests or 500, given.clients))
    sys.exit(throughput(given.requests or 64))
