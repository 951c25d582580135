"""Threads that share an attached model: each must get what it would get alone.

python tests/threads.py --threads 8 --calls 200
"""

from __future__ import annotations

import argparse
import sys
import threading
from typing import Any

import torch
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from evengaze.compat import cache_argument
from evengaze.methods import parse
from evengaze.testing import tiny
from interrupts import METHODS, snapshot


class Collect(BaseStreamer):  # type: ignore[misc]
    """Tokens, as a streamer gets them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def jobs(family: str, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """A model, and prompts that differ in pictures, texts, rows, the number of new tokens and the kind of cache."""
    model, _ = tiny(family)
    found = []
    for k in range(count):
        batch = 1 + k % 2
        _, inputs = tiny(family, batch=batch, seed=k, images=1 + k % 3 // 2)
        options: dict[str, Any] = {"max_new_tokens": 2 + k % 3, "do_sample": False}
        if k % 4 == 3:
            options["use_cache"] = False
        if k % 5 == 4:
            options |= {"static": True, "disable_compile": True}  # generate's own static cache is one for all threads
        found.append({**inputs, **options})
    return model, found


def one(model: Any, job: dict[str, Any]) -> list[int]:
    """One call's tokens; through a streamer where it has a single row."""
    job = dict(job)
    if job.pop("static", False):
        job |= cache_argument(model, StaticCache(config=model.config.get_text_config(), max_cache_len=96))
    if len(job["input_ids"]) > 1:
        return model.generate(**job).flatten().tolist()  # type: ignore[no-any-return]
    streamer = Collect()
    tokens = model.generate(**job, streamer=streamer).flatten().tolist()
    assert streamer.tokens == tokens
    return tokens  # type: ignore[no-any-return]


def hammer(method: str, threads: int, calls: int, family: str = "llava") -> tuple[int, list[str]]:
    """Calls that gave another answer than alone, and what was raised."""
    model, work = jobs(family, threads)
    one(model, work[0])
    before = snapshot(model)
    wrong, raised = [], []
    with parse(method)(model) as run:
        expected = [one(model, job) for job in work]
        gate = threading.Barrier(threads)

        def thread(k: int) -> None:
            gate.wait()
            for i in range(calls):
                j = (k + i) % threads
                try:
                    if one(model, work[j]) != expected[j]:
                        wrong.append((k, i))
                except BaseException as error:
                    raised.append(f"{type(error).__name__}: {error}")

        pool = [threading.Thread(target=thread, args=(k,)) for k in range(threads)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            for t in pool:
                t.start()
            for t in pool:
                t.join()
        finally:
            sys.setswitchinterval(interval)
        assert len(run.traces) >= min(threads * calls, run.traces.maxlen or 0)
    assert snapshot(model) == before
    return len(wrong), raised


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for text in arguments.methods:
        different, errors = hammer(text, arguments.threads, arguments.calls)
        total = arguments.threads * arguments.calls
        print(f"{text}: {arguments.threads} threads x {arguments.calls} calls = {total}: ", end="")
        print(f"{different} differences, {len(errors)} errors {sorted(set(errors))[:3] or ''}", flush=True)
