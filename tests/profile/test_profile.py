"""FLOPs as counted equal the schedule's, times are paired, memory is what was held at once."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from evengaze import FastV
from evengaze.compat import cache_argument
from evengaze.profile import Timing, cache_bytes, clock_selection, count_flops, interleave, peak_bytes, predict
from evengaze.testing import tiny
from evengaze.testing.models import layout_of


def test_counted_flops_agree_with_the_schedule():
    model, inputs = tiny("llama", attention="eager", hidden_size=64, intermediate_size=128, num_hidden_layers=6)
    layout, pruner = layout_of(inputs), FastV(keep=4, layer=2)
    visual, length = 16, inputs["input_ids"].shape[1]

    def run():
        with torch.inference_mode():
            model.model(**inputs, use_cache=False)

    dense = count_flops(run)
    with pruner(model, layout=layout):
        pruned = count_flops(run)
    predicted = predict(pruner, model.config, visual, length - visual)
    assert pruned / dense == pytest.approx(predicted.flops, rel=0.02)  # ranking one row costs the rest
    assert predicted.average == pytest.approx((2 * 16 + 4 * 4) / 6)


def test_predicted_cache_is_the_real_one():
    model, inputs = tiny("llama")
    length, layers = inputs["input_ids"].shape[1], model.config.num_hidden_layers
    sizes = []
    for pruner in (None, FastV(keep=4, layer=2)):
        cache = DynamicCache(config=model.config)
        handle = None if pruner is None else pruner(model, layout=layout_of(inputs))
        model(**inputs, **cache_argument(model, cache))
        if handle is not None:
            handle.remove()
        sizes.append(cache_bytes(cache))
    saving = predict(FastV(keep=4, layer=2), model.config, 16, length - 16)
    assert sizes[1] / sizes[0] == pytest.approx(saving.kv) and layers > 2


def test_calls_are_timed_in_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleave(calls, rounds=3, warmup=1)
    assert set(times) == set("abc") and all(len(t.seconds) == 3 for t in times.values())
    assert [order[i : i + 3] for i in range(0, 12, 3)] == [list("cab"), list("abc"), list("bca"), list("cab")]


def test_ratios_are_paired():
    dense, pruned = Timing((1.0, 10.0, 2.0), (1.0, 1.0, 1.0)), Timing((0.5, 5.0, 1.2), (0.4, 0.4, 0.9))
    assert pruned.ratio(dense) == 0.5 and pruned.cpu_ratio(dense) == 0.4
    assert pruned.median == 1.2 and pruned.best == 0.5


def test_peak_is_what_was_held_at_once():
    def call():
        for _ in range(3):
            a = torch.ones(1000, 1000)
            b = a + 1
            del a, b

    assert peak_bytes(call) == pytest.approx(8e6, rel=0.01)


def test_the_clock_leaves_the_method_as_it_was():
    model, inputs = tiny("llama", batch=2)
    pruner = FastV(keep=4, layer=2)
    with clock_selection(pruner) as seconds, pruner(model, layout=layout_of(inputs)):
        model(**inputs)
    assert len(seconds) == 1 and all(s > 0 for s in seconds)  # both rows at once
    assert "select" not in vars(pruner)
