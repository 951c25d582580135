"""Where the time of a prefill and of an answer goes: tower, decoder, decoding steps.

Nothing is stopped to tell the parts apart, see `Stopwatch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from evengaze.compat import cache_of
from evengaze.profile.latency import synchronize
from evengaze.profile.memory import cache_bytes


@dataclass(frozen=True)
class PrefillTimes:
    """Seconds of one prefill.

    Attributes:
        whole: of the call.
        decoder: of its decoder layers.
        launch: until the decoder's call returned. On a GPU its work may still go on then: what is asked of it is
            queued, and the host is free.
        cpu: processor time of the call.
        kv_bytes: in the cache afterwards.
    """

    whole: float
    decoder: float
    launch: float
    cpu: float
    kv_bytes: int

    @property
    def tower(self) -> float:
        """All that is not the decoder: vision tower, projector, the last token's logits."""
        return self.whole - self.decoder


@dataclass(frozen=True)
class AnswerTimes:
    """Seconds of one answer.

    Attributes:
        whole: of `generate`, prefill included.
        step: of one decoding step on average; None if there was but one token.
    """

    whole: float
    step: float | None


class Stopwatch:
    """Moments of a model's work.

    On one GPU they are events in its stream, which stop nothing; on several, all are waited for.

    Args:
        model: whose work.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {p.device for p in model.parameters()}
        self._event = {d.type for d in devices} == {"cuda"} and len(devices) == 1

    def now(self) -> Any:
        """This moment."""
        if not self._event:
            synchronize()
            return perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two moments, both in the past."""
        return float(start.elapsed_time(end)) / 1e3 if self._event else float(end - start)


@torch.inference_mode()
def clock_prefill(model: Any, decoder: nn.Module, inputs: Mapping[str, Tensor]) -> PrefillTimes:
    """Run one prefill and time its parts.

    Args:
        model: the model, with or without a pruner.
        decoder: its decoder.
        inputs: of the prefill.
    """
    watch = Stopwatch(model)
    moments: list[Any] = []
    clock: list[float] = []

    def mark(*_: Any) -> None:
        moments.append(watch.now())
        clock.append(perf_counter())

    synchronize()
    hooks = [decoder.register_forward_pre_hook(mark, prepend=True), decoder.register_forward_hook(mark)]
    try:
        wall, cpu = perf_counter(), process_time()
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        synchronize()
        wall, cpu = perf_counter() - wall, process_time() - cpu
    finally:
        for hook in hooks:
            hook.remove()
    start, end = moments[0], moments[-1]
    return PrefillTimes(wall, watch.between(start, end), clock[-1] - clock[0], cpu, cache_bytes(cache_of(output)))


@torch.inference_mode()
def clock_answer(model: Any, inputs: Mapping[str, Tensor], tokens: int, *, static: bool = False) -> AnswerTimes:
    """Generate exactly `tokens` tokens greedily and time the steps.

    Args:
        model: the model, with or without a pruner.
        inputs: of `generate`.
        tokens: to generate.
        static: with a static cache, whose decoding transformers compiles on accelerators.
    """
    times: list[float] = []

    def step(ids: Tensor, scores: Tensor) -> Tensor:
        times.append(perf_counter())
        return scores

    processors: Any = LogitsProcessorList([step])
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    if static:
        options["cache_implementation"] = "static"
    with _endless(model) as pad:
        synchronize()
        start = perf_counter()
        model.generate(**inputs, **options, max_new_tokens=tokens, pad_token_id=pad, logits_processor=processors)
        synchronize()
        whole = perf_counter() - start
    return AnswerTimes(whole, (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None)


@contextmanager
def _endless(model: Any) -> Iterator[int]:
    """No token ends an answer; yields one that may pad."""
    settings = model.generation_config
    ends = settings.eos_token_id
    pad = settings.pad_token_id
    first = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    settings.eos_token_id = None
    try:
        yield int(pad if pad is not None else first or 0)
    finally:
        settings.eos_token_id = ends


def busy_seconds(call: Any, device: torch.device) -> float | None:
    """How long a GPU worked during a call, without the gaps in which it waited for the host.

    None elsewhere, and where the GPU's activities cannot be recorded.
    """
    if device.type != "cuda":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that events are cleared behind the one cycle there is
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                synchronize()
    except RuntimeError:
        return None
    inner: Any = profile.profiler
    spans = [
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in inner.kineto_results.events()
        if "CUDA" in str(e.device_type())
    ]
    return union(spans) / 1e9 or None


def union(spans: list[tuple[int, int]]) -> int:
    """Length of what several intervals cover together."""
    total, reach = 0, -1
    for start, end in sorted(spans):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total
