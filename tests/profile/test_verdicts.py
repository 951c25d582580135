"""The sentences follow from the figures by the stated rules, and the figures are those of what ran."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from evengaze import methods
from evengaze.errors import ConfigError
from evengaze.profile.build import random_model
from evengaze.profile.measure import Course, contestants, costs
from evengaze.profile.memory import free_bytes, row_bytes
from evengaze.profile.parts import clock_answer, clock_prefill, union
from evengaze.profile.prompts import make_prompt
from evengaze.profile.rows import ProfileRow
from evengaze.profile.verdict import reach, sentence, verdicts
from evengaze.testing import tiny


def dense(**changes: Any) -> ProfileRow:
    values: dict[str, Any] = {
        "method": "dense",
        "variant": "",
        "batch": 1,
        "visual_tokens": 576,
        "text_tokens": 64,
        "new_tokens": 16,
        "average_tokens": 576.0,
        "flops": 1.0,
        "predicted_flops": 1,
        "predicted_kv": 1.0,
        "predicted_kv_bytes": 1,
        "predicted_step": 1.0,
        "predicted_step_bytes": 1,
        "time": 1.0,
        "time_low": 1.0,
        "time_high": 1.0,
        "prefill_seconds": 0.030,
        "tower_seconds": 0.008,
        "decoder_seconds": 0.022,
        "floor_seconds": 0.004,
    }
    return ProfileRow(**{**values, **changes})


def pruned(time: float, half: float = 0.01, **changes: Any) -> ProfileRow:
    measured = {"time": time, "time_low": time - half, "time_high": time + half}
    return dense(**{"method": "fastv", "flops": 0.3, "average_tokens": 156.0, **measured, **changes})


@pytest.mark.parametrize(
    ("changes", "limit", "most"),
    [
        ({}, "tokens", 0.6),
        ({"launch_seconds": 0.0176, "floor_seconds": 0.019}, "host", 0.1),
        ({"launch_seconds": 0.0175, "floor_seconds": 0.017}, "tokens", 1 / 6),
        ({"launch_seconds": 0.0175, "floor_seconds": 0.019}, "short", 0.1),
        ({"tower_seconds": 0.015, "decoder_seconds": 0.015, "floor_seconds": 0.015}, "tower", 0.0),
        ({"floor_seconds": 0.030}, "short", 0.0),
        ({"floor_seconds": None}, "tokens", None),
    ],
)
def test_what_limits_a_prefill(changes: dict[str, Any], limit: str, most: float | None) -> None:
    found = reach(dense(**changes))
    assert found is not None and found.limit == limit and found.most == (most if most is None else pytest.approx(most))
    assert reach(dense(prefill_seconds=None)) is None


def test_the_dense_model_says_what_can_be_saved() -> None:
    text = sentence(dense(), dense())
    limit = "the decoder's tokens are the limit (22 ms of 30 ms)"
    assert text == f"{limit}: at most 60% of the prefill can be saved in the decoder."
    host = dense(launch_seconds=0.020, floor_seconds=0.021, busy_seconds=0.014, step_seconds=0.02, answer_seconds=0.4)
    text = sentence(host, host)
    assert "the host is the limit (launching takes 20 ms, the decoder 22 ms): at most 3% of" in text
    assert "decoding is 75% of an answer" in text and "graphs would give about 14 ms" in text
    assert "graphs" not in sentence(replace(host, busy_seconds=0.029), host)
    graphed = dense(variant="graphs", time=0.47)
    text = sentence(host, host, graphed)
    assert "with graphs it takes 47% of dense" in text and "would" not in text


def test_a_method_says_what_it_saves_and_why_not_more() -> None:
    assert sentence(pruned(0.5), dense()) == "saves 50% of the prefill, of 60% that can be saved in the decoder."
    host = dense(launch_seconds=0.020, floor_seconds=0.021)
    assert sentence(pruned(1.2), host).startswith("its prefill takes 20% longer: the host is the limit")
    assert "its own work takes longer than it saves" in sentence(pruned(1.2), dense())
    for row in (pruned(0.95, 0.1), pruned(1.05, 0.1), pruned(0.99, 0.001)):
        assert sentence(row, dense()) == "its prefill cannot be told from the dense model's."
    assert sentence(replace(pruned(1.0), failed="it does not fit into memory"), None).startswith(
        "not measured: it does"
    )
    assert "nothing can be compared" in sentence(pruned(1.0), None)


def test_a_budget_that_keeps_everything_is_said() -> None:
    text = sentence(pruned(1.0, average_tokens=576.0), dense())
    assert text.startswith("its budget keeps all 576 visual tokens, so nothing is dropped; its prefill cannot be told")
    assert "keeps all" not in sentence(pruned(1.0), dense())
    assert "keeps all" not in sentence(dense(method="dense (attached)", variant="graphs"), dense())


def test_decoding_gains_where_the_cache_is_what_is_read() -> None:
    step = {"step": 0.995, "step_low": 0.98, "step_high": 1.01, "answer": 0.97}
    text = sentence(pruned(0.5, predicted_step=0.97, **step), dense())
    assert "decoding gains nothing (a step still reads 97% of the bytes), a whole answer takes 97% of dense" in text
    assert "cannot be told" in sentence(pruned(0.5, predicted_step=0.5, **step), dense())
    step |= {"step": 0.8, "step_low": 0.7, "step_high": 0.9}
    assert "a decoding step saves 20%" in sentence(pruned(0.5, predicted_step=0.97, **step), dense())
    step |= {"step": 1.2, "step_low": 1.1, "step_high": 1.3}
    assert "a decoding step takes 20% longer" in sentence(pruned(0.5, predicted_step=0.97, **step), dense())


def test_rows_are_compared_within_their_batch() -> None:
    rows = verdicts([dense(), pruned(0.5), dense(batch=8, floor_seconds=0.0), pruned(0.4, batch=8)])
    assert "of 60%" in rows[1].verdict and "of 73%" in rows[3].verdict


def test_variants_stand_beside_the_dense_model_of_their_kind() -> None:
    graphs = dense(variant="graphs", time=0.8, time_low=0.8, time_high=0.8, prefill_seconds=0.024)
    static = dense(variant="static", time=None, prefill_seconds=None, step_seconds=0.008)
    rows = [dense(), graphs, static, pruned(0.5, variant="graphs", prefill_seconds=0.012)]
    rows.append(replace(pruned(0.5), variant="static", time=None, prefill_seconds=None, step_seconds=0.010))
    said = [row.verdict for row in verdicts(rows)]
    assert "that can be saved" not in said[3]  # graphs go below what launches allow
    assert "50% of the prefill of dense + graphs" in said[3] and "125% of the step of dense + static" in said[4]
    assert not [text for text in said[:3] if "of dense +" in text]


def test_prediction_of_a_step_is_weights_and_cache() -> None:
    model = tiny("llava")[0]
    found = costs(
        model.config, {"f": methods.parse("fastv:keep=4,layer=2")}, 64, 8, batch=2, entry_bytes=4, weight_bytes=4
    )
    text = model.config.text_config
    weights = text.num_hidden_layers * (64 * (64 + 64 + 2 * 32) + 3 * 64 * 128) * 4
    assert found["dense"].step_bytes == weights + 2 * found["dense"].kv_bytes and found["dense"].step_share == 1
    assert found["f"].step_bytes == weights + 2 * found["f"].kv_bytes
    assert found["f"].step_share == found["f"].step_bytes / found["dense"].step_bytes
    with pytest.raises(ConfigError, match="outside the model"):
        costs(model.config, {"f": methods.parse("fastv:layer=40")}, 64, 8)


def test_rows_that_fit_follow_from_the_peaks() -> None:
    assert row_bytes({1: 100}, 10) == 100 and row_bytes({1: 100, 4: 160}, 10) == 20
    assert row_bytes({1: 100, 4: 160}, 50) == 50  # keys and values of the whole answer
    assert row_bytes({2: 100}, 10) == 50
    free = free_bytes("cpu")
    assert free is None or free > 1e6


def test_spans_that_overlap_count_once() -> None:
    assert union([(5, 9), (0, 2), (1, 3), (6, 7)]) == 7 and union([]) == 0


def test_the_parts_are_those_of_what_ran() -> None:
    model = random_model(tiny("llava")[0].config, dtype=torch.float32)
    decoder = model.model.language_model
    prompt = make_prompt(model, 64, 8)
    part = clock_prefill(model, decoder, prompt.rows(2))
    assert 0 < part.decoder < part.whole and part.tower == part.whole - part.decoder and 0 < part.launch <= part.whole
    assert part.kv_bytes == 2 * 6 * 2 * 2 * 16 * (prompt.visual + prompt.text) * 4
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))  # any token ends it
    answer = clock_answer(model, prompt.rows(2), 5)
    assert answer.step is not None and 4 * answer.step < answer.whole
    assert len(model.generation_config.eos_token_id) == model.config.text_config.vocab_size
    assert clock_answer(model, prompt.rows(1), 1).step is None


def test_a_course_measures_dense_and_methods_at_each_batch() -> None:
    model = random_model(tiny("llava")[0].config, dtype=torch.float32)
    pruners = {"fastv:keep=4": methods.parse("fastv:keep=4")}
    prompt = make_prompt(model, 64, 8)
    model(**prompt.rows(1))  # transformers hooks its own layers on first use

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    course = Course(model, prompt, pruners, static=True, new_tokens=3, rounds=2)
    steps: list[int] = []
    rows = course.finish([row for batch in (1, 2) for row in course.run(batch, lambda: steps.append(1))])
    names = ["dense", "fastv:keep=4", "dense + static", "fastv:keep=4 + static"]
    assert [row.name for row in rows] == names * 2 and [row.batch for row in rows] == [1] * 4 + [2] * 4
    assert len(steps) == 6
    for row in rows:
        assert row.step_seconds and row.answer_seconds and (row.prefill_seconds is None) == (row.variant == "static")
        assert row.largest_batch is None and "on cpu" in row.largest_batch_why and row.busy_seconds is None
    bare, fast = rows[0], rows[1]
    assert bare.time == bare.decoder == bare.step == bare.kv_cache == bare.flops == 1 and bare.launch_seconds is None
    assert fast.kv_bytes == fast.predicted_kv_bytes and fast.kv_cache == pytest.approx(fast.predicted_kv)
    assert hooks() == before


def test_what_cannot_be_measured_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny("llava")[0].config, dtype=torch.float32)
    course = Course(model, make_prompt(model, 64, 8), {"f": methods.parse("fastv:keep=4")}, new_tokens=0, rounds=1)
    attached = contestants({"f": methods.parse("fastv:keep=4")})[1].attached

    def full(self: Any, model: Any) -> Any:
        if self.method == "f":
            raise torch.OutOfMemoryError("out of memory")
        return attached(model) if self.pruner else __import__("contextlib").nullcontext()

    monkeypatch.setattr("evengaze.profile.measure.Contestant.attached", full)
    bare, failed = course.run(1)
    assert bare.prefill_seconds and failed.failed == "it does not fit into memory" and failed.time is None
    assert verdicts([bare, failed])[1].verdict == "not measured: it does not fit into memory."
    assert bare.step is None and bare.answer_seconds is None


def test_graphs_are_timed_when_they_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU captures nothing: a stand-in runs the function again."""
    events: list[str] = []

    class StandIn:
        def __init__(self, function: Any, inputs: Any, pool: Any) -> None:
            self._function = function
            events.append("captured")

        def __call__(self, inputs: Any) -> Any:
            events.append("replayed")
            return self._function(inputs)

        @staticmethod
        def pool() -> None:
            return None

    def timed(*arguments: Any) -> Any:
        events.append("timing")
        return clock_prefill(*arguments)

    monkeypatch.setattr("evengaze.engine.graphs.recorder", lambda model: StandIn)
    monkeypatch.setattr("evengaze.profile.measure.clock_prefill", timed)
    model = random_model(tiny("llava")[0].config, dtype=torch.float32)
    pruners = {"f": methods.parse("fastv:keep=4")}
    course = Course(model, make_prompt(model, 64, 8), pruners, graphs=True, new_tokens=2, rounds=1)
    rows = verdicts(course.finish(course.run(1)))
    assert [row.name for row in rows] == ["dense", "f", "dense + graphs", "f + graphs"]
    assert all(row.time is not None and row.answer_seconds is not None for row in rows)
    assert "with graphs it takes" in rows[1].verdict and "with graphs" not in rows[3].verdict
    calls = "".join({"timing": "|", "captured": "c", "replayed": "r"}[event] for event in events).split("|")
    turns = ["", "crcr", "rr", "rr"], ["", "crcrcr", "rrr", "rrr"]  # plain, captured, replayed, timed
    for turn in turns:  # dense: tower and all layers; the method: a cut more
        starts = range(len(calls) - 3)
        found = [[*calls[i : i + 3], calls[i + 3][: len(turn[3])]] for i in starts]  # answers follow the last
        assert turn in found
