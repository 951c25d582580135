"""What a cache remembers follows it: crops, rewinds, copies, files, repeated and selected rows."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import evengaze as eg
from evengaze.compat import cache_argument, cache_of
from evengaze.errors import AttachError, ConfigError
from evengaze.methods import get, parse
from evengaze.testing import tiny
from evengaze.testing.matrix import METHODS
from evengaze.testing.oracle import replayed
from reference import dropped_from, generate, masked_from

FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3"]
STEPS = 6


def method(name):
    return get(name)(**METHODS[name])


def new_cache(model, kind="dynamic"):
    config = model.config.get_text_config()
    if kind == "static":
        return StaticCache(config=config, max_cache_len=160)
    cache = DynamicCache() if kind == "lazy" else DynamicCache(config=config)
    cache.activate_past_recording()  # windows forget what a crop needs otherwise, pruned or not
    return cache


def go_on(model, inputs, ids, cache, steps=3):
    """Generate behind `ids`, of which the cache holds the beginning."""
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = inputs["attention_mask"][:, : ids.shape[1]]
    mask = torch.cat([mask, torch.ones(len(ids), max(0, grown), dtype=torch.long)], 1)
    options = {**cache_argument(model, cache), "disable_compile": True}
    return generate(model, {"input_ids": ids, "attention_mask": mask}, steps, **options)[1]


def answer(model, inputs, cache):
    """Whole sequences and logits of a first answer."""
    tokens, logits, _ = generate(model, inputs, STEPS, **cache_argument(model, cache), disable_compile=True)
    return torch.cat([inputs["input_ids"], tokens], 1), logits


def rewound(model, inputs, cache, back):
    """Answer, crop by `back` tokens behind the third of the answer, and say the same again."""
    ids, logits = answer(model, inputs, cache)
    upto = inputs["input_ids"].shape[1] + 3
    cache.crop(upto - back - int(cache.get_seq_length()))
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {upto - back}
    again = go_on(model, inputs, ids[:, :upto], cache)
    return float((again - logits[:, 3:]).abs().max() / logits.abs().max())


@pytest.mark.parametrize(("batch", "back"), [(1, 6), (3, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_cropped_may_be_said_again(family, batch, back):
    """Into the answer, and into the question: equal to a cache that was never cropped."""
    model, inputs = tiny(family, batch)
    for name in METHODS:
        if method(name).stages(6)[0].trims_below and back > 3:
            continue  # below its stage such a cache has lost what the question saw
        with method(name)(model):
            assert rewound(model, inputs, new_cache(model), back) < 1e-5, name


@pytest.mark.parametrize("kind", ["lazy", "static"])
@pytest.mark.parametrize("name", list(METHODS))
def test_other_caches_are_cropped_alike(kind, name):
    if kind == "static" and not hasattr(StaticLayer, "crop"):
        pytest.skip("this release of transformers cannot crop static caches")
    model, inputs = tiny("llava", 3)
    with method(name)(model):
        assert rewound(model, inputs, new_cache(model, kind), 2) < 1e-5


@pytest.mark.parametrize("name", list(METHODS))
def test_another_question_about_the_same_picture(name):
    """Exact: as the oracle answers it with the tokens that the first question chose."""
    model, inputs = tiny("llava", 3)
    slow, _ = tiny("llava", 3, "eager")
    cache = new_cache(model)
    with method(name)(model) as run:
        answer(model, inputs, cache)
        length = inputs["input_ids"].shape[1] - 2
        cache.crop(length - cache.get_seq_length())
        ids = torch.cat([inputs["input_ids"][:, :length], torch.tensor([[33, 44, 55, 66, 77]]).expand(3, -1)], 1)
        logits = go_on(model, inputs, ids, cache)
    mask = inputs["attention_mask"][:, :length]
    longer = {
        "input_ids": ids,
        "attention_mask": torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1),
        "pixel_values": inputs["pixel_values"],
    }
    with replayed(slow, run.pruner, replace(run.trace, length=length), mask):
        expected = generate(slow, longer, 3, use_cache=False)[1]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-4


@pytest.mark.parametrize("spec", ["fastv:keep=5", "pyramiddrop:layers=[2,4],keep=[8,4]", "uniform:keep=5,layer=0"])
def test_rows_whose_pictures_stand_at_other_places(spec):
    """Cut behind one row's picture and before the other's, rows hold unlike numbers of tokens."""
    model, _ = tiny("llava")
    text = list(range(20, 40))
    early = [1, *[290] * 16, *text, 41, 42]
    late = [1, *text, *[290] * 16, 43, 44]
    ids = torch.tensor([early, late])
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    cache, length = new_cache(model), 20
    tail = torch.tensor([[60, 61, 62], [63, 64, 65]])
    with parse(spec)(model) as run:
        answer(model, inputs, cache)
        cache.crop(length - cache.get_seq_length())
        told = torch.cat([ids[:, :length], tail], 1)
        logits = go_on(model, inputs, told, cache)
        for b in range(2):
            alone = new_cache(model)
            row = {k: v[b : b + 1] for k, v in inputs.items()}
            answer(model, row, alone)
            alone.crop(length - alone.get_seq_length())
            assert torch.allclose(go_on(model, row, told[b : b + 1], alone)[0], logits[b], atol=1e-4)
    assert run.trace is not None


def test_two_pictures_can_be_parted_but_none_be_split():
    model, inputs = tiny("llava", images=2)
    ids = inputs["input_ids"]
    places = (ids[0] == 290).nonzero()[:, 0]
    between, inside = int(places[16]), int(places[20])
    fresh = torch.cat([ids[:, :between], torch.tensor([[33, 44, 55]])], 1)
    slow, _ = tiny("llava", images=2, attention="eager")
    with eg.FastV(keep=7)(model) as run:
        cache = new_cache(model)
        answer(model, inputs, cache)
        held = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(ConfigError, match="midst"):
            cache.crop(inside - cache.get_seq_length())
        assert all(torch.equal(a, layer.keys) for a, layer in zip(held, cache.layers, strict=True))
        cache.crop(between - cache.get_seq_length())
        logits = go_on(model, inputs, fresh, cache)
    plan = [(layer, gone[:, :between]) for layer, gone in dropped_from(run.trace)]
    first = {"input_ids": fresh, "attention_mask": torch.ones_like(fresh), "pixel_values": inputs["pixel_values"][:1]}
    with masked_from(slow, plan):
        assert torch.allclose(generate(slow, first, 3, use_cache=False)[1], logits, atol=1e-4)
    with parse("tokencarve:keep=7")(model):  # merges across pictures
        cache = new_cache(model)
        answer(model, inputs, cache)
        with pytest.raises(ConfigError, match="midst"):
            cache.crop(between - cache.get_seq_length())


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "tokencarve", "divprune"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_cropped_to_before_the_picture_is_an_ordinary_one(name, kind):
    if kind == "static" and not hasattr(StaticLayer, "crop"):
        pytest.skip("this release of transformers cannot crop static caches")
    model, inputs = tiny("llava")
    start = int((inputs["input_ids"][0] == 290).nonzero()[0])
    ids = torch.cat([inputs["input_ids"][:, :start], torch.tensor([[7, 8, 9]])], 1)
    expected = go_on(model, inputs, ids, new_cache(model, kind))
    for length in (start, 0):
        cache = new_cache(model, kind)
        with method(name)(model):
            answer(model, inputs, cache)
            cache.crop(length - int(cache.get_seq_length()))
        assert torch.allclose(go_on(model, inputs, ids, cache), expected, atol=1e-5)


def test_a_later_picture_can_be_taken_back():
    """The answer to the first turn goes on as if the second had never been."""
    model, inputs = tiny("llava", 3)
    pixels = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(9))
    for name in METHODS:
        cache = new_cache(model)
        with method(name)(model):
            ids, logits = answer(model, inputs, cache)
            length = int(cache.get_seq_length())
            extra = torch.tensor([11, 12, *[290] * 16, 13, 14]).expand(3, -1)
            second = torch.cat([ids, extra], 1)
            grown = second.shape[1] - inputs["attention_mask"].shape[1]
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, grown, dtype=torch.long)], 1)
            later = {"input_ids": second, "attention_mask": mask, "pixel_values": pixels}
            model.generate(**later, max_new_tokens=3, do_sample=False, **cache_argument(model, cache))
            cache.crop(length - cache.get_seq_length())
            other = copy.deepcopy(cache)
            cache.crop(-2)
            again = go_on(model, inputs, ids[:, :-1], cache, 1)
            assert torch.allclose(again[:, 0], logits[:, -1], atol=1e-4), name
            assert go_on(model, inputs, ids, other).isfinite().all()


def test_windows_that_forgot_refuse_to_go_back():
    model, inputs = tiny("gemma3")
    cache = DynamicCache(config=model.config.get_text_config())
    with eg.FastV(keep=5, layer=4)(model):
        ids, _ = answer(model, inputs, cache)
        held = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(ConfigError, match="window of 12"):
            cache.crop(-2)
        assert all(torch.equal(a, layer.keys) for a, layer in zip(held, cache.layers, strict=True))
        assert go_on(model, inputs, ids, cache).isfinite().all()


def test_static_windows_refuse_to_go_back():
    model, inputs = tiny("gemma3")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    with eg.FastV(keep=5, layer=4)(model):
        answer(model, inputs, cache)
        with pytest.raises(ConfigError, match="cropped"):
            cache.crop(-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prefix_many_questions(family):
    """Copies of a pruned prefix answer as if each question were the first to follow it."""
    model, inputs = tiny(family)
    ids = inputs["input_ids"]
    questions = [[33, 44, 55], [66, 77], [88, 99, 111, 122]]
    for name in ("fastv", "pyramiddrop", "sparsevlm", "tokencarve", "divprune"):
        with method(name)(model):
            prefix = new_cache(model)
            answer(model, inputs, prefix)
            prefix.crop(ids.shape[1] - prefix.get_seq_length())
            for question in questions:
                asked = torch.cat([ids, torch.tensor([question])], 1)
                one = go_on(model, inputs, asked, copy.deepcopy(prefix))
                fresh = new_cache(model)
                answer(model, inputs, fresh)
                fresh.crop(ids.shape[1] - fresh.get_seq_length())
                assert torch.equal(go_on(model, inputs, asked, fresh), one), name


def saved(how, cache):
    if how == "deepcopy":
        return copy.deepcopy(cache)
    if how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(("family", "kind"), [("llava", "dynamic"), ("llava", "static"), ("gemma3", "dynamic")])
def test_copies_and_files_remember(how, family, kind):
    model, inputs = tiny(family, 3)
    for name in ("fastv", "sparsevlm", "tokencarve", "divprune"):
        cache = new_cache(model, kind)
        with method(name)(model):
            ids, _ = answer(model, inputs, cache)
            loaded = saved(how, cache)
            expected = go_on(model, inputs, ids, copy.deepcopy(cache))
            assert torch.equal(go_on(model, inputs, ids, copy.deepcopy(loaded)), expected), name
        with pytest.raises(AttachError, match="with"):
            go_on(model, inputs, ids, loaded)


def test_a_file_is_guarded_in_another_process(tmp_path):
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model):
        cache = generate(model, inputs, 2)[2]
    file = tmp_path / "cache.pkl"
    file.write_bytes(pickle.dumps(cache))
    code = (
        "import pickle, sys, torch; cache = pickle.load(open(sys.argv[1], 'rb'))\n"
        "states = torch.zeros(1, 2, 1, 16)\n"
        "try: cache.update(states, states, 0)\n"
        "except Exception as e: print(type(e).__name__, int(cache.get_seq_length(3)), cache.layers[3].keys.shape[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    length = inputs["input_ids"].shape[1] + 1
    assert done.stdout.split() == ["AttachError", str(length), str(length - 11)], done.stderr


def test_keys_and_values_alone_are_refused():
    """As data parallelism and older code copy caches: what is remembered would be left behind."""
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model):
        cache = generate(model, inputs, 2)[2]
        with pytest.raises(AttachError, match="deepcopy"):
            DynamicCache(iter(cache))
    cache.reset()
    list(cache)
    assert len(list(generate(model, inputs, 2)[2])) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_repeated_reordered_and_selected(family):
    """As contrastive search does: every row is tried with several tokens, and one of them goes on."""
    model, inputs = tiny(family, 3)
    length = inputs["input_ids"].shape[1]
    for name in METHODS:
        with method(name)(model):
            cache = new_cache(model)
            ids, _ = answer(model, inputs, cache)
            cache.crop(length - cache.get_seq_length())
            told = torch.cat([ids[:, :length], ids[:, length : length + 2]], 1)
            expected = go_on(model, inputs, told, copy.deepcopy(cache))
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([1, 0, 3, 2, 5, 4]))
            cache.batch_select_indices(torch.tensor([4, 0, 3]))  # rows 2, 0, 1
            rows = torch.tensor([2, 0, 1])
            shuffled = {"attention_mask": inputs["attention_mask"][rows]}
            if "rope_deltas" in vars(base := model.base_model) and base.rope_deltas is not None:
                base.rope_deltas = base.rope_deltas[rows]
            found = go_on(model, shuffled, told[rows], cache)
            assert torch.allclose(found, expected[rows], atol=1e-4), name


def test_layers_share_what_they_remember():
    """Whatever is done to a cache, a step makes one mask for each kept set, not one for each layer."""
    model, inputs = tiny("llava", 3)
    with parse("pyramiddrop:layers=[2,4],keep=[8,4]")(model):
        cache = new_cache(model)
        answer(model, inputs, cache)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.crop(inputs["input_ids"].shape[1] - 1 - cache.get_seq_length())
    assert len({id(layer.kept) for layer in saved("pickle", cache).layers[2:]}) == 2
    assert len({id(layer.kept) for layer in cache.layers[2:]}) == 2


def test_the_cache_of_an_output_is_the_one_that_was_given():
    model, inputs = tiny("llava")
    cache = new_cache(model)
    with torch.no_grad(), eg.FastV(keep=5)(model):
        assert cache_of(model(**inputs, **cache_argument(model, cache))) is cache
    assert isinstance(cache, DynamicCache)
