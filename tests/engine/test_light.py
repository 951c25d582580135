"""The engine asks an accelerator for next to nothing, and compiled decoding is compiled once for all requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import evengaze as eg
from evengaze.compat import cache_argument, cache_of
from evengaze.debias import Exponential
from evengaze.errors import ScoreError
from evengaze.methods import parse
from evengaze.testing import layout_of, tiny
from evengaze.testing.reads import DeviceReads

METHODS = [
    "dense",
    "fastv:keep=5",
    "pyramiddrop:keep=[0.5,0.25],layers=[2,4]",
    "sparsevlm:keep=[6,3],layers=[1,3]",
    "himap:keep=[6,3],layers=[2,4]",
    "illava:keep=5,layer=2",
    "divprune:keep=5",
    "tome:keep=5",
    "random:keep=5",
    "uniform:keep=5",
    "pool:keep=5",
]
BOTH = eg.Debias(eg.PaddingMask(), Exponential(1.5))


def counted(family: str, batch: int, pruner: Any) -> tuple[DeviceReads, DeviceReads]:
    """Reads of a prefill and of a decoding step."""
    model, inputs = tiny(family, batch)
    layout = layout_of(inputs) if family == "llama" else None
    mask = inputs["attention_mask"]
    handle = None if pruner is None else pruner(model, layout=layout)
    try:
        with torch.no_grad(), DeviceReads(model, inputs) as prefill:
            cache = cache_of(model(**inputs, use_cache=True, logits_to_keep=1))
        token, one = torch.full((batch, 1), 7), torch.ones(batch, 1, dtype=torch.long)
        longer, place = torch.cat([mask, one], 1), mask.sum(1, keepdim=True)
        held = [[layer.keys, layer.values] for layer in cache.layers]
        step = {"input_ids": token, "attention_mask": longer, "position_ids": place}
        with torch.no_grad(), DeviceReads(model, step, held) as decode:
            model(**step, **cache_argument(model, cache), use_cache=True)
    finally:
        if handle is not None:
            handle.remove()
    return prefill, decode


@pytest.mark.parametrize("debias", [None, BOTH], ids=["plain", "debiased"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_prefill_reads_two_values_at_most_and_a_step_none(method: str, batch: int, debias: Any) -> None:
    """Beyond what the model itself reads. The question of `random` is a third where pictures are found in it."""
    for family, most in (("llama", 2), ("llava", 3 if method.startswith("random") else 2)):
        base = counted(family, batch, None)
        prefill, step = counted(family, batch, parse(method).replace(debias=debias))
        assert prefill.total - base[0].total <= most, prefill.places
        assert step.total <= base[1].total, step.places
        assert sum(prefill.uploads.values()) <= sum(base[0].uploads.values()), prefill.places


def test_tokencarve_reads_the_status_of_its_decomposition_as_well() -> None:
    for batch in (1, 4):
        base = counted("llama", batch, None)
        prefill, step = counted("llama", batch, parse("tokencarve:keep=5"))
        assert prefill.reads["eigh"] == 1
        assert prefill.total - base[0].total <= 3 and step.total <= base[1].total


def test_scores_that_are_not_numbers_are_reported_when_they_are_known() -> None:
    """On a GPU the outcome of a check is looked at once it is there, at the latest when the pruner is detached."""
    model, inputs = tiny("llava")

    class Later:
        def __init__(self, known: bool) -> None:
            self.known, self.looked = known, False

        def check(self) -> None:
            self.looked = True
            raise ScoreError("NaN")

    with torch.no_grad(), parse("fastv:keep=5")(model) as run:
        run._pending.append(later := Later(False))
        model(**inputs)
        assert not later.looked
        later.known = True
        with pytest.raises(ScoreError):
            model(**inputs)
    handle = parse("fastv:keep=5")(model)
    handle._pending.append(later := Later(False))
    with pytest.raises(ScoreError):
        handle.remove()
    with pytest.raises(ZeroDivisionError), parse("fastv:keep=5")(model) as run:  # the first error is the one to report
        run._pending.append(Later(False))
        raise ZeroDivisionError
    assert later.looked


def test_a_check_is_looked_at_once_though_two_calls_find_it_known() -> None:
    model, inputs = tiny("llava")
    with torch.no_grad(), parse("fastv:keep=5")(model) as run:

        class Known:
            asked = checked = 0

            @property
            def known(self) -> bool:
                self.asked += 1
                if self.asked == 1:  # what another thread's call may do right behind the question
                    run._model_calls.look()
                return True

            def check(self) -> None:
                self.checked += 1

        run._pending.append(one := Known())
        model(**inputs)
    assert one.checked == 1


def test_rows_cost_no_reads() -> None:
    for method in METHODS:
        few, many = (counted("llama", batch, parse(method))[0].total for batch in (2, 8))
        assert few == many


def test_tables_of_transformers_hold_plain_names() -> None:
    """torch 2.11 breaks graphs, the dense model's too, at a table with a key that hashes in a way of its own."""
    model, inputs = tiny("llava")
    with torch.no_grad(), parse("fastv:keep=5")(model):
        model(**inputs)
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        assert all(type(name) is str for name in table)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "tokencarve:keep=5"])
def test_one_graph_or_two_for_any_number_of_requests(method: str) -> None:
    """One attachment a request, of different lengths; equal to eager decoding; the dense model in between."""
    model, _ = tiny("llava")
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    for number, (extra, new) in enumerate([(0, 4), (0, 4), (3, 6), (5, 4), (9, 8), (1, 5), (17, 3), (2, 9)]):
        _, inputs = tiny("llava", seed=number)
        more = torch.randint(5, 250, (1, extra), generator=torch.Generator().manual_seed(number))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad(), parse(method)(model):
            found = [
                model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
                for options in (static, {})
            ]
        assert torch.equal(*found)
    assert graphs["unique_graphs"] <= 2 and not torch._dynamo.utils.counters["graph_break"]
    dense = [model.generate(**inputs, max_new_tokens=4, do_sample=False, **options) for options in (static, {})]
    assert torch.equal(*dense)
