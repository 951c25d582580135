"""What a profile says of one method at one batch size: measured figures beside predicted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from evengaze.profile.latency import Timing
from evengaze.profile.parts import AnswerTimes, PrefillTimes

Variant = Literal["", "graphs", "static"]
DENSE = "dense"


def label(method: str, variant: str) -> str:
    """A method with its variant."""
    return f"{method} + {variant}" if variant else method


@dataclass(frozen=True)
class ProfileRow:
    """One contestant at one batch size. Ratios are to the dense model of the same batch; None was not measured.

    Attributes:
        method: its name.
        variant: "" as it comes, "graphs" with CUDA graphs between the stages, "static" with a static cache.
        batch: rows.
        visual_tokens: of one row's prompt.
        text_tokens: of one row's prompt.
        new_tokens: of one row's answer.
        average_tokens: predicted: visual tokens that enter a layer, averaged over the layers.
        flops: predicted: of the decoder's prefill.
        predicted_flops: the same, absolute, of one row.
        predicted_kv: predicted: cache after the prefill.
        predicted_kv_bytes: the same in bytes, of the batch.
        predicted_step: predicted: bytes that a decoding step reads.
        predicted_step_bytes: the same in bytes.
        time: of the whole prefill; `time_low` and `time_high` are its interval.
        cpu_time: of the whole prefill, in processor time of all threads.
        prefill_seconds: median of the whole prefill.
        best_seconds: shortest whole prefill.
        tower_seconds: median of what is not the decoder: vision tower, projector, logits.
        decoder_seconds: median of the decoder layers.
        decoder: of the decoder layers; `decoder_low` and `decoder_high` are its interval.
        busy_seconds: how long the GPU worked in a prefill.
        step: of a decoding step; `step_low` and `step_high` are its interval.
        step_seconds: median of a decoding step.
        answer: of a whole answer; `answer_low` and `answer_high` are its interval.
        answer_seconds: median of a whole answer.
        peak_memory: most bytes that a prefill holds beyond the weights.
        peak_bytes: the same in bytes.
        kv_cache: bytes of keys and values after the prefill.
        kv_bytes: the same in bytes.
        floor_seconds: of the decoder on the prompt's text alone; of the dense model.
        launch_seconds: until the host has asked for all of that; of the dense model, on a GPU.
        largest_batch: rows that the device's free memory holds.
        largest_batch_why: why that is not known.
        failed: why nothing was measured.
        verdict: what follows, in one sentence.
    """

    method: str
    variant: str
    batch: int
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    average_tokens: float
    flops: float
    predicted_flops: int
    predicted_kv: float
    predicted_kv_bytes: int
    predicted_step: float
    predicted_step_bytes: int
    time: float | None = None
    time_low: float | None = None
    time_high: float | None = None
    cpu_time: float | None = None
    prefill_seconds: float | None = None
    best_seconds: float | None = None
    tower_seconds: float | None = None
    decoder_seconds: float | None = None
    decoder: float | None = None
    decoder_low: float | None = None
    decoder_high: float | None = None
    busy_seconds: float | None = None
    step: float | None = None
    step_low: float | None = None
    step_high: float | None = None
    step_seconds: float | None = None
    answer: float | None = None
    answer_low: float | None = None
    answer_high: float | None = None
    answer_seconds: float | None = None
    peak_memory: float | None = None
    peak_bytes: int | None = None
    kv_cache: float | None = None
    kv_bytes: int | None = None
    floor_seconds: float | None = None
    launch_seconds: float | None = None
    largest_batch: int | None = None
    largest_batch_why: str = ""
    failed: str = ""
    verdict: str = ""

    @property
    def name(self) -> str:
        """What tells it from the other rows of its batch."""
        return label(self.method, self.variant)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What one batch size gave, by contestants' names.

    Attributes:
        prefills: one entry a round.
        answers: one entry a round; none if answers were not measured.
        peaks: most bytes that a prefill held at once.
        failed: why nothing was measured.
        floor: prefills of the prompt's text alone, by the dense model; None if it does not run without a picture.
        queued: whether the device works on while the host goes ahead.
    """

    prefills: Mapping[str, Sequence[PrefillTimes]]
    answers: Mapping[str, Sequence[AnswerTimes]]
    peaks: Mapping[str, int]
    failed: Mapping[str, str]
    floor: Sequence[PrefillTimes] | None
    queued: bool

    def prefill(self, name: str) -> dict[str, Any]:
        """A row's columns about the prefill."""
        runs, dense = self.prefills.get(name), self.prefills.get(DENSE)
        if not runs:
            return {}
        values: dict[str, Any] = {
            "prefill_seconds": median(r.whole for r in runs),
            "best_seconds": min(r.whole for r in runs),
            "tower_seconds": median(r.tower for r in runs),
            "decoder_seconds": median(r.decoder for r in runs),
            "peak_bytes": self.peaks[name],
            "kv_bytes": runs[0].kv_bytes,
        }
        if dense:
            whole, base = (Timing(tuple(r.whole for r in s), tuple(r.cpu for r in s)) for s in (runs, dense))
            values |= _ratio("time", whole, base) | {"cpu_time": whole.cpu_ratio(base)}
            values |= _ratio("decoder", _timing([r.decoder for r in runs]), _timing([r.decoder for r in dense]))
            values["peak_memory"] = self.peaks[name] / max(1, self.peaks[DENSE])
            values["kv_cache"] = runs[0].kv_bytes / max(1, dense[0].kv_bytes)
        if self.floor is not None:
            values["floor_seconds"] = median(r.decoder for r in self.floor)
            values["launch_seconds"] = median(r.launch for r in self.floor) if self.queued else None
        return values

    def answer(self, name: str) -> dict[str, Any]:
        """A row's columns about whole answers."""
        runs, dense = self.answers.get(name), self.answers.get(DENSE)
        if not runs:
            return {}
        steps = [r.step for r in runs if r.step is not None]
        values: dict[str, Any] = {"answer_seconds": median(r.whole for r in runs), "step_seconds": median(steps)}
        if dense:
            values |= _ratio("answer", _timing([r.whole for r in runs]), _timing([r.whole for r in dense]))
            values |= _ratio("step", _timing(steps), _timing([r.step for r in dense if r.step is not None]))
        return values


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(tuple(seconds), ())


def _ratio(name: str, timing: Timing, base: Timing) -> dict[str, float]:
    low, high = timing.interval(base)
    return {name: timing.ratio(base), f"{name}_low": low, f"{name}_high": high}
