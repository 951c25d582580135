"""Costs from schedules alone, and what a profile says when times contradict them."""

from __future__ import annotations

import pytest

from evengaze import FastV, methods
from evengaze.cli.profile import contradictions
from evengaze.errors import ConfigError
from evengaze.profile import Timing
from evengaze.profile.plan import picture_tokens, plan
from evengaze.schedule import DecoderShape
from evengaze.testing import tiny


def test_costs_are_those_of_the_schedule() -> None:
    dense, pruned = plan({"dense": methods.parse("dense"), "f": FastV(keep=128)}, DecoderShape(), 32, 576, 64)
    assert dense.flops_share == dense.kv_share == 1 and dense.steps == "576 in all layers"
    assert dense.kv_bytes == 32 * 2 * 32 * 128 * 640 * 2  # layers, keys and values, heads, width, tokens, bytes
    assert pruned.average_tokens == 156 and pruned.steps == "576 -> 128 at layer 2"
    assert pruned.kv_bytes == 2 * 32 * 128 * 2 * (2 * 640 + 30 * 192)
    assert 0 < pruned.flops_share < pruned.kv_share * 1.1
    (half,) = plan({"f": FastV(keep=128)}, DecoderShape(), 32, 576, 64, entry_bytes=0.5)
    assert half.kv_bytes * 4 == pruned.kv_bytes and half.kv_share == pruned.kv_share
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) * 2
    assert dense.step_bytes == weights + dense.kv_bytes and pruned.step_bytes == weights + pruned.kv_bytes
    (rows,) = plan({"f": FastV(keep=128)}, DecoderShape(), 32, 576, 64, batch=32)
    assert rows.step_bytes == weights + 32 * pruned.kv_bytes and rows.step_share < 0.75 < 0.98 < pruned.step_share < 1
    with pytest.raises(ConfigError, match="outside the model"):
        plan({"f": FastV(layer=40)}, DecoderShape(), 32, 576)


def test_tokens_of_a_picture_are_known_where_they_are_fixed() -> None:
    model, inputs = tiny("llava")
    shown = int((inputs["input_ids"] == model.config.image_token_id).sum(1)[0])
    model.config.image_seq_length = shown
    assert picture_tokens(model.config) == shown
    assert picture_tokens(tiny("qwen2_vl")[0].config) is None


@pytest.mark.parametrize(("rounds", "cut"), [(1, 0), (3, 0), (5, 0), (9, 1), (15, 3)])
def test_the_interval_of_a_median_lies_between_order_statistics(rounds: int, cut: int) -> None:
    times = Timing(tuple(float(i + 1) for i in range(rounds)), (1.0,) * rounds)
    reference = Timing((1.0,) * rounds, (1.0,) * rounds)
    low, high = times.interval(reference)
    assert (low, high) == (cut + 1, rounds - cut) and low <= times.ratio(reference) <= high


def row(method: str, flops: float, time: float, half: float) -> dict[str, object]:
    return {"method": method, "flops": flops, "time": time, "time_low": time - half, "time_high": time + half}


def test_times_in_another_order_than_flops_are_said() -> None:
    rows = [row("dense", 1.0, 1.0, 0.0), row("half", 0.6, 0.7, 0.2), row("quarter", 0.4, 0.8, 0.2)]
    (text,) = contradictions(rows)
    assert "quarter has fewer FLOPs than half" in text and "noise" in text
    (text,) = contradictions([row("half", 0.6, 0.7, 0.01), row("quarter", 0.4, 0.8, 0.01)])
    assert "do not overlap" in text
    assert not contradictions([row("a", 0.6, 0.7, 0.01), row("b", 0.595, 0.8, 0.01), row("c", 0.3, 0.5, 0.01)])
