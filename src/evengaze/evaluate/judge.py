"""Judges: models that grade free-form answers, and the cache that makes judging resumable.

What a judge says depends on its snapshot (by 8 to 10 points on video question answering, Video-LLaVA issue 37), so its
exact name, address and prompt go into every result.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evengaze.errors import ConfigError, DataError, EvengazeError
from evengaze.evaluate.jsonl import append_line, read_jsonl, repair_tail
from evengaze.models.loading import load_model, load_tokenizer

Message = dict[str, str]
T = TypeVar("T")
# So many items in a row without an answer mean that the judge is gone, not that the items are odd.
MAX_FAILURES_IN_A_ROW = 20


class JudgeError(EvengazeError, RuntimeError):
    """The judge gave no usable reply.

    Attributes:
        fatal: Asking about another item cannot help (wrong key, no such model).
    """

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


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
            messages: The chat, as ``role`` and ``content``.
            max_tokens: Limit on the reply, or None for the server's.
            temperature: Sampling temperature, or None for the server's default.
            turn: Tells repetitions of one question apart ("run 2, try 3"); part of the cache key.

        Raises:
            JudgeError: No reply.
        """


class OpenAIJudge(Judge):
    """A chat-completions server, OpenAI's or any compatible one.

    Args:
        model: Model name, as exact as the server takes it (``gpt-4-0613``).
        base_url: Server address, or None for OpenAI's.
        api_key: Key, or None to read ``OPENAI_API_KEY``; servers of one's own take any.
        timeout: Seconds to wait for a reply.
        max_retries: How often rate limits, time-outs and server errors are retried, waiting longer each time.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 6,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError("this judge needs the openai package: pip install 'evengaze[judge]'") from None
        key = api_key or os.environ.get("OPENAI_API_KEY")
        if key is None and base_url is None:
            raise ConfigError("no key for the judge: set OPENAI_API_KEY, or give the base URL of your own server.")
        self._openai = openai
        self.model = model
        self._client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=max_retries)
        self.base_url = str(self._client.base_url)

    def describe(self) -> dict[str, Any]:
        """Return kind, model and base URL; never the key."""
        return {"kind": "openai", "model": self.model, "base_url": self.base_url}

    def ask(
        self, messages: Sequence[Message], max_tokens: int | None, temperature: float | None, turn: str = ""
    ) -> Reply:
        """Ask the server once (and again after transient errors)."""
        given: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        try:
            done = self._client.chat.completions.create(
                model=self.model,
                messages=list(messages),
                **{name: value for name, value in given.items() if value is not None},
            )
        except self._openai.APIStatusError as error:
            fatal = error.status_code in (401, 403, 404)
            raise JudgeError(f"{self.base_url} answered {error.status_code}: {error.message}", fatal) from error
        except self._openai.OpenAIError as error:
            raise JudgeError(f"{self.base_url} cannot be asked: {error}") from error
        if not done.choices or done.choices[0].message.content is None:
            raise JudgeError(f"{self.base_url} sent an empty reply")
        return Reply(done.choices[0].message.content, done.model or self.model)


class LocalJudge(Judge):
    """A chat model run here through transformers. Its verdicts are not comparable with published ones.

    Args:
        model: Model id or folder.
        device: Where to put it; None takes a GPU when there is one.
        dtype: Precision, as in ``from_pretrained``.
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
        self._known = {row["key"]: Reply(row["reply"], row["model"]) for row in lines.records}

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
    keys: Sequence[str], grade: Callable[[str], T], workers: int
) -> tuple[dict[str, T], list[dict[str, str]]]:
    """Grade items side by side; an item whose judge fails is listed, not scored.

    Args:
        keys: Items.
        grade: Grades one item; raises ``JudgeError`` when it cannot.
        workers: Items at a time.

    Returns:
        Grades by key in the order of ``keys``, and the failed items with the reason.

    Raises:
        JudgeError: The judge refuses everything: a fatal error, or a long run of failures and nothing else.
    """
    grades: dict[str, T] = {}
    errors: list[dict[str, str]] = []
    in_a_row = 0

    def attempt(key: str) -> tuple[str, T | None, JudgeError | None]:
        try:
            return key, grade(key), None
        except JudgeError as error:
            return key, None, error

    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for key, result, error in pool.map(attempt, keys):
                if error is None:
                    grades[key] = result  # type: ignore[assignment]
                    in_a_row = 0
                    continue
                in_a_row += 1
                errors.append({"key": key, "error": str(error)})
                if error.fatal or (in_a_row >= MAX_FAILURES_IN_A_ROW and not grades):
                    raise JudgeError(f"the judge answers nothing: {error}", fatal=True) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return grades, errors
