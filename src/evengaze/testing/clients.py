"""Clients for a chat completions server that may lose patience: load with and without disconnects."""

from __future__ import annotations

import base64
import http.client
import json
import random
import socket
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from PIL.Image import Image

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Outcome:
    """What a client saw.

    Attributes:
        text: the answer; None if it went away before, or got none.
        status: HTTP status; 0 if it went away before one came.
        seconds: from the request's first byte to the answer's end.
        left: whether it went away on purpose.
    """

    text: str | None
    status: int
    seconds: float
    left: bool = False


def question(model: str, text: str, *images: Image, **fields: Any) -> dict[str, Any]:
    """The body of a request about pictures."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for image in images:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], **fields}


def ask(url: str, body: Mapping[str, Any], seconds: float = 300) -> Outcome:
    """Ask, and wait for the whole answer, streamed or not."""
    start = perf_counter()
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=seconds)
    try:
        connection.request("POST", PATH, json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        raw = answer.read().decode()
        text = None if answer.status != 200 else _streamed(raw) if body.get("stream") else _whole(raw)
        return Outcome(text, answer.status, perf_counter() - start)
    finally:
        connection.close()


def ask_and_leave(url: str, body: Mapping[str, Any], patience: float, share: float = 1.0) -> Outcome:
    """Send a share of a request, wait for so many seconds, and cut the connection, half of the time by a reset."""
    start = perf_counter()
    place = urlsplit(url)
    data = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((place.hostname or "", place.port or 80), timeout=60) as connection:
        connection.sendall((head.encode() + data)[: max(1, round(share * (len(head) + len(data))))])
        sleep(patience)
        if int(patience * 1e6) % 2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return Outcome(None, 0, perf_counter() - start, left=True)


def crowd(
    url: str, bodies: Sequence[Mapping[str, Any]], *, clients: int = 16, leaving: float = 0.0, seed: int = 0
) -> list[Outcome]:
    """Many clients at once.

    Args:
        url: the server's.
        bodies: one a request.
        clients: how many ask at a time.
        leaving: share of the requests whose client goes away: while sending, while waiting, or while reading.
        seed: who leaves, and when.
    """
    rng = random.Random(seed)
    plans = [
        (rng.random() < leaving, rng.uniform(0, 1.5), rng.uniform(0.05, 1.0) if rng.random() < 0.3 else 1.0)
        for _ in bodies
    ]

    def one(body: Mapping[str, Any], plan: tuple[bool, float, float]) -> Outcome:
        leaves, patience, share = plan
        return ask_and_leave(url, body, patience, share) if leaves else ask(url, body)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, bodies, plans))


def _whole(raw: str) -> str:
    return str(json.loads(raw)["choices"][0]["message"]["content"])


def _streamed(raw: str) -> str | None:
    """The text of a stream; None if it ends with an error or not at all."""
    lines = [line.removeprefix("data: ") for line in raw.splitlines() if line]
    if not lines or lines.pop() != "[DONE]":
        return None
    chunks = [json.loads(line) for line in lines]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
