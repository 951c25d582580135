"""Measure methods on one model and one size of prompt: dense and all methods in turns, part by part.

The dense model is the bare one: nothing is attached to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evengaze.errors import EvengazeError, out_of_memory
from evengaze.methods import Pruner, parse
from evengaze.models import adapter_for
from evengaze.profile.latency import take_turns
from evengaze.profile.memory import free_bytes, peak_bytes, row_bytes
from evengaze.profile.parts import AnswerTimes, PrefillTimes, busy_seconds, clock_answer, clock_prefill
from evengaze.profile.plan import Cost, depth_of, plan
from evengaze.profile.prompts import Prompt
from evengaze.profile.rows import DENSE, Measured, ProfileRow, Variant, label
from evengaze.schedule import DecoderShape

_SIGHTS = 3
"""Calls until a graph replays: the first runs as ever, the second captures, the third replays."""
_TEXT = "the text alone"


@dataclass(frozen=True)
class Contestant:
    """What takes a turn.

    Attributes:
        method: its name.
        pruner: what is attached; None: nothing.
        variant: "" as it comes, "graphs" with CUDA graphs between the stages, "static" with a static cache.
    """

    method: str
    pruner: Pruner | None = None
    variant: Variant = ""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return label(self.method, self.variant)

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """The model as this one needs it."""
        if self.pruner is None:
            yield
            return
        options: Any = {"graphs": True} if self.variant == "graphs" else {}
        with self.pruner(model, **options):
            yield


def contestants(pruners: Mapping[str, Pruner], *, graphs: bool = False, static: bool = False) -> list[Contestant]:
    """Dense and the methods; then the same with graphs, and with a static cache.

    Args:
        pruners: by name.
        graphs: whether the second group is wanted.
        static: whether the third group is.
    """
    found = [Contestant(DENSE), *(Contestant(name, pruner) for name, pruner in pruners.items())]
    if graphs:
        dense = Contestant(DENSE, parse("dense"), "graphs")
        found += [dense, *(Contestant(name, pruner, "graphs") for name, pruner in pruners.items())]
    if static:
        found += [replace(one, variant="static") for one in found if not one.variant]
    return found


def costs(model_config: Any, pruners: Mapping[str, Pruner], visual: int, text: int, **sizes: Any) -> dict[str, Cost]:
    """What is predicted, by method, the dense model's among it; `sizes` as in `plan`.

    Raises:
        ConfigError: a method does not fit the model's depth or the prompt.
    """
    every = {DENSE: parse("dense"), **pruners}
    shape = DecoderShape.from_config(model_config)
    return {one.method: one for one in plan(every, shape, depth_of(model_config), visual, text, **sizes)}


class Course:
    """One model and one prompt; `run` measures a batch size.

    Args:
        model: the model.
        prompt: one row.
        pruners: the methods by name.
        graphs: whether to measure with graphs, too.
        static: whether to measure answers with a static cache, too.
        new_tokens: of an answer; with less than two, answers are not measured.
        rounds: timed rounds.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        pruners: Mapping[str, Pruner],
        *,
        graphs: bool = False,
        static: bool = False,
        new_tokens: int = 16,
        rounds: int = 5,
    ) -> None:
        self._model, self._rounds, self._new = model, rounds, new_tokens
        self._decoder: nn.Module = adapter_for(model).decoder(model)
        self._pruners = pruners
        self._every = contestants(pruners, graphs=graphs, static=static)
        self.prompt = self._seen(prompt)

    def _seen(self, prompt: Prompt) -> Prompt:
        """The prompt, with the visual tokens that methods choose among: a picture may hold others, such as newlines."""
        with torch.inference_mode(), parse("dense")(self._model) as run:
            self._model(**prompt.rows(1), logits_to_keep=1)
        visual = 0 if run.trace is None else len(run.trace.layout.rows[0])
        return replace(prompt, visual=visual, text=int(prompt.inputs["input_ids"].shape[1]) - visual)

    # -- one batch size ------------------------------------------------------------------------------------------------
    def run(self, batch: int, advance: Callable[[], None] = lambda: None) -> list[ProfileRow]:
        """Measure dense and all methods with `batch` rows; `advance` is called after each of three steps."""
        with torch.cuda.device(self._model.device) if self._model.device.type == "cuda" else nullcontext():
            return self._run(batch, advance)

    def _run(self, batch: int, advance: Callable[[], None]) -> list[ProfileRow]:
        inputs = self.prompt.rows(batch)
        failed: dict[str, str] = {}
        peaks: dict[str, int] = {}
        for one in self._every:
            why, peak = self._try(one, inputs)
            if why:
                failed[one.name] = why
            elif peak is not None:
                peaks[one.name] = peak
        advance()
        fit = [one for one in self._every if one.name not in failed]
        turns: dict[str, Callable[[], PrefillTimes]] = {
            one.name: partial(self._prefill, one, inputs) for one in fit if one.variant != "static"
        }
        text = self.prompt.without_pictures(self._model, batch)
        if self._takes(text):  # in turns with the others: a host's speed changes
            turns[_TEXT] = partial(clock_prefill, self._model, self._decoder, text)
        prefills = take_turns(turns, rounds=self._rounds)
        advance()
        answers = {}
        if self._new > 1:
            answers = take_turns({one.name: partial(self._answer, one, inputs) for one in fit}, rounds=self._rounds)
        advance()
        floor = prefills.pop(_TEXT, None)
        predicted = self._costs(batch)
        measured = Measured(prefills, answers, peaks, failed, floor, self._model.device.type == "cuda")
        return [self._row(one, batch, predicted[one.method], measured) for one in self._every]

    def _try(self, one: Contestant, inputs: Mapping[str, Tensor]) -> tuple[str, int | None]:
        """Whatever is done on first use is done here, and the peak of memory is read.

        Returns:
            Why it cannot be measured, "" if it can; the peak of a prefill.
        """
        model = self._model

        def prefill() -> None:
            with one.attached(model):
                for _ in range(_SIGHTS if one.variant == "graphs" else 1):
                    clock_prefill(model, self._decoder, inputs)

        peak = None
        try:
            if one.variant != "static":
                prefill()
                peak = peak_bytes(prefill, model.device)
            if self._new > 1:
                self._answer(one, inputs)
        except EvengazeError as error:
            if not one.variant:
                raise
            return " ".join(str(error).split()), None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            return "it does not fit into memory", None
        return "", peak

    def _prefill(self, one: Contestant, inputs: Mapping[str, Tensor]) -> PrefillTimes:
        with one.attached(self._model):
            for _ in range(_SIGHTS if one.variant == "graphs" else 0):
                clock_prefill(self._model, self._decoder, inputs)
            return clock_prefill(self._model, self._decoder, inputs)

    def _answer(self, one: Contestant, inputs: Mapping[str, Tensor]) -> AnswerTimes:
        with one.attached(self._model):
            for _ in range(_SIGHTS if one.variant == "graphs" else 0):
                clock_answer(self._model, inputs, 1)
            return clock_answer(self._model, inputs, self._new, static=one.variant == "static")

    def _takes(self, text: Mapping[str, Tensor]) -> bool:
        """Whether the model runs without a picture, so that it can be seen what pruning cannot go below."""
        try:
            clock_prefill(self._model, self._decoder, text)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        return True

    def _costs(self, batch: int) -> dict[str, Cost]:
        numbers = sum(p.numel() for p in self._decoder.parameters())
        size = sum(p.numel() * p.element_size() for p in self._decoder.parameters())
        return costs(
            self._model.config,
            self._pruners,
            self.prompt.visual,
            self.prompt.text,
            batch=batch,
            entry_bytes=self._model.dtype.itemsize,
            weight_bytes=size / max(1, numbers),
        )

    def _row(self, one: Contestant, batch: int, cost: Cost, measured: Measured) -> ProfileRow:
        row = ProfileRow(
            method=one.method,
            variant=one.variant,
            batch=batch,
            visual_tokens=self.prompt.visual,
            text_tokens=self.prompt.text,
            new_tokens=self._new,
            average_tokens=cost.average_tokens,
            flops=cost.flops_share,
            predicted_flops=cost.flops,
            predicted_kv=cost.kv_share,
            predicted_kv_bytes=batch * cost.kv_bytes,
            predicted_step=cost.step_share,
            predicted_step_bytes=cost.step_bytes,
            failed=measured.failed.get(one.name, ""),
        )
        return replace(row, **measured.prefill(one.name), **measured.answer(one.name))

    # -- all batch sizes -----------------------------------------------------------------------------------------------
    def finish(self, rows: Sequence[ProfileRow]) -> list[ProfileRow]:
        """The rows of all batch sizes with what is asked for at the end: how long the GPU works, and what fits.

        Recording a GPU's activities slows down later launches, so it comes behind all that is timed.
        """
        if self._model.device.type == "cuda":
            by_name = {one.name: one for one in self._every}
            with torch.cuda.device(self._model.device):
                rows = [self._with_busy(row, by_name[row.name]) for row in rows]
        return self._fitting(rows)

    def _with_busy(self, row: ProfileRow, one: Contestant) -> ProfileRow:
        if row.prefill_seconds is None:
            return row
        inputs = self.prompt.rows(row.batch)
        with one.attached(self._model):
            for _ in range(_SIGHTS if one.variant == "graphs" else 1):
                clock_prefill(self._model, self._decoder, inputs)
            call = partial(clock_prefill, self._model, self._decoder, inputs)
            return replace(row, busy_seconds=busy_seconds(call, self._model.device))

    def _fitting(self, rows: Sequence[ProfileRow]) -> list[ProfileRow]:
        """The largest batch that fits, from the device's free memory and the peaks of all batches."""
        device = self._model.device
        if device.type != "cuda":
            why = f"on {device.type} memory is shared with other programs, and swapped"
            return [replace(row, largest_batch_why=why) for row in rows]
        free = free_bytes(device)
        assert free is not None
        shape, depth = DecoderShape.from_config(self._model.config), depth_of(self._model.config)
        new = self._new * depth * shape.kv_bytes(1, self._model.dtype.itemsize)
        found = []
        for row in rows:
            alike = [r for r in rows if r.name == row.name and r.peak_bytes is not None]
            if not alike:
                found.append(replace(row, largest_batch_why=row.failed or "its prefill is the dense model's"))
                continue
            kept = max((r.kv_bytes or 0) // r.batch for r in alike) + new
            each = row_bytes({r.batch: r.peak_bytes or 0 for r in alike}, kept)
            found.append(replace(row, largest_batch=free // each))
        return found
