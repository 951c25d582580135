"""Judges: models that grade free-form answers, and the cache that makes judging resumable.

What a judge says depends on its snapshot (by 8 to 10 points on video question answering, Video-LLaVA issue 37), so its
exact name, address and prompt go into every result.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from evengaze.errors import ConfigError, DataError, EvengazeError
from evengaze.evaluate.jsonl import append_line, read_jsonl, repair_tail
from evengaze.extras import require
from evengaze.models.loading import load_model, load_tokenizer

Message = dict[str, str]
Say = Callable[[str], None]
"""Told, in a line, how judging goes."""
T = TypeVar("T")
# So many items in a row without an answer mean that the judge is gone, not that the items are odd.
MAX_FAILURES_IN_A_ROW = 20
_REPORT_EVERY = 15.0
_QUIET_FOR = 5.0
"""Seconds of an outage before it is worth a line; servers that are only busy answer somebody within them."""
_LONGEST_PAUSE = 30.0


def silent(line: str) -> None:
    """Say nothing."""


class JudgeError(EvengazeError, RuntimeError):
    """The judge gave no usable reply.

    Attributes:
        fatal: Asking about another item cannot help (wrong key, no such model, no server for minutes).
        silent: The judge said nothing at all, as opposed to something that is of no use.
    """

    def __init__(self, message: str, fatal: bool = False, silent: bool = False) -> None:
        super().__init__(message)
        self.fatal, self.silent = fatal, silent or fatal


@dataclass(frozen=True)
class Reply:
    """What the judge said, and the name it gave itself."""

    text: str
    model: str


class Judge(ABC):
    """A model that continues a chat."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what identifies the judge (recorded in results, part of the cache key)."""

    @abstractmethod
    def ask(
        self, messages: Sequence[Message], max_tokens: int | None, temperature: float | None, turn: str = ""
    ) -> Reply:
        """Ask once.

        Args:
            messages: The chat, as `role` and `content`.
            max_tokens: Limit on the reply, or None for the server's.
            temperature: Sampling temperature, or None for the server's default.
            turn: Tells repetitions of one question apart ("run 2, try 3"); part of the cache key.

        Raises:
            JudgeError: No reply.
        """


class Outage:
    """What several threads know of one server: since when none of them got an answer, and whether that was said.

    Args:
        name: Server, for the messages.
        patience: Seconds without any answer after which it is given up.
        say: Told of an outage's beginning, course and end.
    """

    def __init__(self, name: str, patience: float, say: Say) -> None:
        self._name, self._patience, self._say = name, patience, say
        self._lock = threading.Lock()
        self._since: float | None = None
        self._said = 0.0

    def answered(self) -> None:
        """The server has answered something."""
        with self._lock:
            if self._since is not None and self._said:
                self._say(f"{self._name} answers again, after {time.monotonic() - self._since:.0f} s")
            self._since, self._said = None, 0.0

    def failed(self, reason: str, began: float) -> None:
        """The server has failed to answer a request that began at some time.

        Raises:
            JudgeError: It has been down for too long.
        """
        with self._lock:
            now = time.monotonic()
            self._since = began if self._since is None else min(self._since, began)
            down = now - self._since
            if down > self._patience:
                raise JudgeError(
                    f"{self._name} has not answered for {down:.0f} s ({reason}). Replies that came before are kept; "
                    "give the same command again when it is back.",
                    fatal=True,
                )
            if down >= _QUIET_FOR and now - self._said >= _REPORT_EVERY:
                self._said = now
                self._say(
                    f"{self._name} has not answered for {down:.0f} s ({reason}); it is asked again until "
                    f"{self._patience:.0f} s are over"
                )


class OpenAIJudge(Judge):
    """A chat-completions server, OpenAI's or any compatible one.

    Args:
        model: Model name, as exact as the server takes it (`gpt-4-0613`).
        base_url: Server address, or None for OpenAI's.
        api_key: Key, or None to read `OPENAI_API_KEY`; servers of one's own take any.
        timeout: Seconds to wait for a reply.
        max_retries: How often rate limits, time-outs and server errors are retried, waiting longer each time.
        patience: Seconds without any reply to anybody after which the server is given up.
        say: Told of outages.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 6,
        patience: float = 300.0,
        say: Say = silent,
    ) -> None:
        require("judge", "a judge behind an API", "openai")
        import openai

        key = api_key or os.environ.get("OPENAI_API_KEY")
        if key is None and base_url is None:
            raise ConfigError("no key for the judge: set OPENAI_API_KEY, or give the base URL of your own server.")
        self._openai = openai
        self.model = model
        self._retries = max_retries
        # Retries are made here: the client's own are silent, and each of its threads would have to learn anew.
        try:
            self._client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=0)
        except Exception as error:  # whatever the client makes of an address that is none
            raise ConfigError(f"the judge's address {base_url!r} cannot be used: {error}") from None
        self.base_url = str(self._client.base_url)
        self._outage = Outage(f"the judge at {self.base_url}", patience, say)

    def describe(self) -> dict[str, Any]:
        """Return kind, model and base URL; never the key."""
        return {"kind": "openai", "model": self.model, "base_url": self.base_url}

    def ask(
        self, messages: Sequence[Message], max_tokens: int | None, temperature: float | None, turn: str = ""
    ) -> Reply:
        """Ask the server once (and again after transient errors)."""
        given: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        options = {name: value for name, value in given.items() if value is not None}
        for number in range(self._retries + 1):
            began = time.monotonic()
            try:
                done = self._client.chat.completions.create(model=self.model, messages=list(messages), **options)
            except self._openai.APIStatusError as error:
                status, reason = error.status_code, f"{self.base_url} answered {error.status_code}: {error.message}"
                if status not in (408, 409, 429) and status < 500:
                    self._outage.answered()
                    raise JudgeError(reason, fatal=status in (401, 403, 404)) from error
                wait = _retry_after(error.response.headers.get("retry-after"))
            except self._openai.APIConnectionError as error:  # time-outs are of this kind
                reason, wait = f"{self.base_url} cannot be asked: {error}", None
            except self._openai.OpenAIError as error:
                raise JudgeError(f"{self.base_url} cannot be asked: {error}") from error
            except Exception as error:  # a body that is no JSON, or not what its header says
                self._outage.answered()
                raise JudgeError(
                    f"{self.base_url} sent what cannot be read ({type(error).__name__}: {error})"
                ) from error
            else:
                self._outage.answered()
                return self._read(done)
            self._outage.failed(reason, began)
            if number < self._retries:
                time.sleep(min(0.5 * 2**number if wait is None else wait, _LONGEST_PAUSE))
        raise JudgeError(reason, silent=True)

    def _read(self, done: Any) -> Reply:
        """Take the text out of what the client made of a body; servers send anything."""
        try:
            text, name = done.choices[0].message.content, done.model
        except (AttributeError, IndexError, TypeError):
            raise JudgeError(f"{self.base_url} sent no chat completion but {str(done)[:80]!r}") from None
        if not isinstance(text, str):
            raise JudgeError(f"{self.base_url} sent an empty reply")
        return Reply(text, name if isinstance(name, str) and name else self.model)


def _retry_after(header: str | None) -> float | None:
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:  # a date
        return None


class LocalJudge(Judge):
    """A chat model run here through transformers. Its verdicts are not comparable with published ones.

    Args:
        model: Model id or folder.
        device: Where to put it; None takes a GPU when there is one.
        dtype: Precision, as in `from_pretrained`.
        max_tokens: Limit on the reply where the benchmark sets none.
    """

    def __init__(self, model: str, device: str | None = None, dtype: Any = "auto", max_tokens: int = 256) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = model
        self.max_tokens = max_tokens
        self._tokenizer = load_tokenizer(model, name=f"judge {model}")
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{model} has no chat template and cannot judge. Choose an instruction-tuned model.")
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded, _ = load_model(AutoModelForCausalLM, model, name=f"judge {model}", dtype=dtype)
        self._model = loaded.eval().to(place)
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Return kind, model and revision."""
        return {
            "kind": "transformers",
            "model": self.model,
            "revision": getattr(self._model.config, "_commit_hash", None),
        }

    def ask(
        self, messages: Sequence[Message], max_tokens: int | None, temperature: float | None, turn: str = ""
    ) -> Reply:
        """Generate one reply: greedily, or sampled with a seed that depends on the question and the turn only."""
        try:
            return self._generate(messages, max_tokens, temperature, turn)
        except Exception as error:  # whatever a template or model makes of this one question
            reason = f"the judge {self.model} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise JudgeError(reason) from error

    def _generate(
        self, messages: Sequence[Message], max_tokens: int | None, temperature: float | None, turn: str
    ) -> Reply:
        import torch

        inputs = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature}
        seed = int(_digest([list(messages), turn])[:12], 16)
        with self._lock, torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            out = self._model.generate(**inputs, max_new_tokens=max_tokens or self.max_tokens, **sampling)
        new = out[0, inputs["input_ids"].shape[1] :]
        return Reply(self._tokenizer.decode(new, skip_special_tokens=True), self.model)


class CachedJudge(Judge):
    """Keeps every reply of another judge in a JSON-lines file, so that judging can be stopped and resumed.

    Args:
        judge: The judge to ask what the file does not know.
        path: The file (a line torn by a crash is cut off), or None to keep replies in memory only.
    """

    def __init__(self, judge: Judge, path: Path | None) -> None:
        self._judge = judge
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, Reply] = {}
        if path is None or not path.exists():
            return
        repair_tail(path)
        lines = read_jsonl(path, ("key", "reply", "model"))
        if lines.malformed:
            bad = lines.malformed[0]
            raise DataError(f"{path} line {bad.line}: {bad.reason}. It is no judge cache; give another file.")
        for number, row in enumerate(lines.records, 1):
            if not all(isinstance(row[name], str) for name in ("key", "reply", "model")):
                raise DataError(f"{path} record {number} holds no texts. It is no judge cache; give another file.")
            self._known[row["key"]] = Reply(row["reply"], row["model"])

    def describe(self) -> dict[str, Any]:
        """Describe the judge behind the cache."""
        return self._judge.describe()

    def ask(
        self, messages: Sequence[Message], max_tokens: int | None, temperature: float | None, turn: str = ""
    ) -> Reply:
        """Return the kept reply, or ask and keep it."""
        key = _digest([self.describe(), list(messages), max_tokens, temperature, turn])
        with self._lock:
            if key in self._known:
                return self._known[key]
        reply = self._judge.ask(messages, max_tokens, temperature, turn)
        with self._lock:
            self._known[key] = reply
            if self._path is not None:
                append_line(self._path, {"key": key, "turn": turn, "reply": reply.text, "model": reply.model})
        return reply


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def judge_all(
    keys: Sequence[str], grade: Callable[[str], T], workers: int, say: Say = silent
) -> tuple[dict[str, T], list[dict[str, str]]]:
    """Grade items side by side; an item whose judge fails is listed, not scored.

    Args:
        keys: Items.
        grade: Grades one item; raises `JudgeError` when it cannot.
        workers: Items at a time.
        say: Told every quarter of a minute how far it is.

    Returns:
        Grades by key in the order of `keys`, and the failed items with the reason.

    Raises:
        JudgeError: The judge refuses everything: a fatal error, a long run of failures and nothing before it, or a long
            run of no replies at all.
    """
    grades: dict[str, T] = {}
    errors: dict[str, str] = {}
    through: SimpleQueue[tuple[str, Future[T]]] = SimpleQueue()  # in the order in which they come to an end
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for key in keys:
                pool.submit(grade, key).add_done_callback(lambda future, key=key: through.put((key, future)))  # type: ignore[misc]
            in_a_row, said = 0, time.monotonic()
            for _ in keys:
                key, future = through.get()
                error = future.exception()
                if error is None:
                    grades[key], in_a_row = future.result(), 0
                elif isinstance(error, JudgeError):
                    errors[key], in_a_row = str(error), in_a_row + 1
                    if error.fatal or (in_a_row >= MAX_FAILURES_IN_A_ROW and (error.silent or not grades)):
                        more = "any more" if grades else "at all"
                        raise JudgeError(f"the judge answers nothing {more}: {error}", fatal=True) from error
                else:
                    raise error
                if time.monotonic() - said >= _REPORT_EVERY:
                    said = time.monotonic()
                    say(f"judged {len(grades)} of {len(keys)}" + (f", {len(errors)} failed" if errors else ""))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    listed = [{"key": key, "error": errors[key]} for key in keys if key in errors]
    return {key: grades[key] for key in keys if key in grades}, listed
