"""What Prometheus is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from evengaze.trace import Trace

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_METHOD = ["method"]
_BATCH = (1, 2, 4, 8, 16, 32, 64)
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ")
"""Name and labels at the beginning of a sample's line."""


class Metrics:
    """The metrics of one server, in a registry of their own. Methods are told apart by name, not by parameters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        where: Any = {"registry": self.registry, "namespace": "evengaze"}
        self.requests = Counter("requests", "Requests by HTTP status.", ["status"], **where)
        self.places = Gauge("requests_in_progress", "Requests that hold a place.", **where)
        self.waiting = Gauge("queue_waiting", "Requests that wait for the model.", **where)
        self.running = Gauge("batch_running", "Requests that the model is answering.", **where)
        self.batch = Histogram("batch_size", "Requests of a batch.", buckets=_BATCH, **where)
        where |= {"buckets": _SECONDS}
        self.queued = Histogram("queue_seconds", "From arrival to the batch's start.", **where)
        self.prefill = Histogram("prefill_seconds", "To a batch's first tokens.", _METHOD, **where)
        self.answer = Histogram("request_seconds", "From arrival to the answer's end.", _METHOD, **where)
        del where["buckets"]
        self.before = Counter("visual_tokens_before", "Visual tokens of prompts.", _METHOD, **where)
        self.after = Counter("visual_tokens_after", "Visual tokens that enter a layer, on average.", _METHOD, **where)
        self.prompt = Counter("prompt_tokens", "Tokens of prompts.", **where)
        self.completion = Counter("completion_tokens", "Tokens of answers.", **where)
        self.kv = Counter("kv_bytes", "Bytes of the KV caches behind prefills.", _METHOD, **where)
        self.kv_unpruned = Counter("kv_bytes_unpruned", "What they would be without pruning.", _METHOD, **where)
        self.left = Counter("disconnects", "Clients that went away before their answer began.", **where)

    def observe_prefill(self, method: str, trace: Trace | None, rows: int, seconds: float) -> None:
        """Count a batch's prefill."""
        self.prefill.labels(method).observe(seconds)
        if trace is None:
            return
        self.before.labels(method).inc(sum(trace.visual_tokens(row)[0] for row in range(rows)))
        self.after.labels(method).inc(sum(trace.average_tokens(row) for row in range(rows)))
        self.kv.labels(method).inc(sum(trace.kv_bytes))
        self.kv_unpruned.labels(method).inc(sum(trace.kv_bytes_unpruned))

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Read the queue's length when asked for it."""
        self.waiting.set_function(length)


def labelled(texts: Mapping[str, str]) -> str:
    """The metrics of several processes as one text: each sample gets the label `replica`, each family stays together.

    Args:
        texts: Prometheus' text format, by the name of the process that wrote it.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for name, text in texts.items():
        samples: list[str] = []
        for line in text.splitlines():
            if not line.startswith("#"):
                samples.append(_SAMPLE.sub(partial(_with_label, name), line))
                continue
            head, samples = families.setdefault(line.split()[2], ([], []))
            if line not in head:
                head.append(line)
    return "".join(f"{line}\n" for head, samples in families.values() for line in (*head, *samples))


def _with_label(name: str, found: re.Match[str]) -> str:
    labels = [f'replica="{name}"', *([found[2]] if found[2] else [])]
    return f"{found[1]}{{{','.join(labels)}}} "
