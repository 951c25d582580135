"""What outlives a call, a handle or an error, and what must not."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import evengaze as eg
from evengaze.compat import cache_argument, checkpoints_hooks
from evengaze.debias import Exponential, SinkMask
from evengaze.errors import AttachError, ConfigError
from evengaze.methods import parse
from evengaze.testing import tiny
from reference import generate

METHODS = ["fastv:keep=5", "pyramiddrop:layers=[2,4],keep=[8,4]", "sparsevlm:layers=[1,3],keep=[9,4]"]


def second_turn(model, inputs, cache, first):
    extra = torch.tensor([11, 12, 13]).expand(len(first), -1)
    ids = torch.cat([first, extra], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(first), grown, dtype=torch.long)], 1)
    return generate(model, {"input_ids": ids, "attention_mask": mask}, 4, **cache_argument(model, cache))[1]


@pytest.mark.parametrize("other", [None, "fastv:keep=3,layer=5", "uniform:keep=3,layer=4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_cache_may_go_on_under_another_handle(method, other):
    model, inputs = tiny("llava", batch=3)
    results = []
    for later in (None, other or method):
        cache = DynamicCache(config=model.config.get_text_config())
        with parse(method)(model):
            first = model.generate(**inputs, max_new_tokens=3, do_sample=False, **cache_argument(model, cache))
            if later is None:
                results.append(second_turn(model, inputs, cache, first))
        if later is not None:
            with parse(later)(model):
                results.append(second_turn(model, inputs, cache, first))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", [*METHODS, "tokencarve:keep=5", "uniform:keep=5,layer=0"])
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static", "sliding"])
def test_a_pruned_cache_is_refused_without_a_pruner(method, kind):
    """By its first layer, so that nothing has been stored and it can be gone on with."""
    model, inputs = tiny("gemma3" if kind == "sliding" else "llava", batch=3)
    config = model.config.get_text_config()
    caches = {"lazy": lambda: DynamicCache(), "static": lambda: StaticCache(config=config, max_cache_len=96)}
    cache = caches.get(kind, lambda: DynamicCache(config=config))()
    pruner = parse(method)
    with pruner(model):
        first = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, **cache_argument(model, cache), disable_compile=True
        )
        expected = second_turn(model, inputs, copy.deepcopy(cache), first)
    token, mask = first[:, -1:], torch.ones(first.shape, dtype=torch.long)
    for refused in (
        lambda: second_turn(model, inputs, cache, first),
        lambda: model(input_ids=token, attention_mask=mask, **cache_argument(model, cache)),
    ):
        with pytest.raises(AttachError, match="with"):
            refused()
    with pruner(model):
        assert torch.equal(second_turn(model, inputs, cache, first), expected)


def test_a_cache_that_was_pruned_can_be_used_anew_after_a_reset():
    model, inputs = tiny("llava")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    options = {**cache_argument(model, cache), "disable_compile": True}
    expected = generate(model, inputs, **options)[1]
    cache.reset()
    with eg.FastV(keep=5)(model):
        generate(model, inputs, **options)
    cache.reset()
    assert torch.equal(generate(model, inputs, **options)[1], expected)


@pytest.mark.parametrize("method", ["fastv:keep=5", "pyramiddrop:layers=[2,4],keep=[8,4]"])
def test_masks_by_layer_type_say_what_is_padding(method):
    """With a static cache, generate hands Gemma 3 a dictionary of masks."""
    model, inputs = tiny("gemma3", batch=2)
    method = method.replace("layer=2", "layer=4")
    with parse(method)(model):
        dynamic = generate(model, inputs)[1]
        static = generate(model, inputs, cache_implementation="static", disable_compile=True)[1]
    assert (dynamic - static).abs().max() < 1e-3


def test_a_failed_call_leaves_nothing_to_the_next():
    model, inputs = tiny("llava")
    bad = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 290, 7)}
    with torch.no_grad(), eg.FastV(keep=5)(model) as run:
        expected = model(**inputs).logits
        with pytest.raises(ValueError):
            model(**bad)
        assert torch.equal(model(**inputs).logits, expected)
        assert run.trace is not None


@pytest.mark.parametrize("method", [*METHODS, "random:keep=5", "himap:layers=[2,4],keep=[8,4]", "tokencarve:keep=5"])
def test_gradients_flow_and_the_trace_holds_none(method):
    model, inputs = tiny("llava")
    with parse(method)(model) as run:
        logits = model(**inputs, use_cache=False).logits
        logits.sum().backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    for stage in run.trace.stages:
        for row in stage.rows:
            assert row.raw is None or not row.raw.requires_grad
            assert row.scores is None or not row.scores.requires_grad


@pytest.mark.parametrize("method", [*METHODS, "tokencarve:keep=5", "uniform:keep=5,layer=0"])
def test_training_with_gradient_checkpointing(method):
    """Layers run once more in the backward pass, when the call is over: they must see what they saw, or be refused."""
    found = []
    for checkpointing in (False, True):
        model, inputs = tiny("llava", batch=2)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 290, -100)
        with parse(method)(model):
            if any(map(checkpoints_hooks, model.model.language_model.layers)):  # transformers before 5.23
                with pytest.raises(ConfigError, match=r"gradient checkpointing .* Upgrade"):
                    model(**inputs, labels=labels)
                return
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        found.append((loss.detach(), *(layer.mlp.up_proj.weight.grad for layer in model.model.language_model.layers)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


TOWER = ["visionzip:keep=5", "illava:keep=9,layer=3,vision_layers=[0,1],vision_drop=2"]


@pytest.mark.parametrize("method", TOWER)
def test_training_of_a_tower_in_which_patches_leave(method):
    """Gradients are those of what is computed, and the same if the tower's layers run once more for them."""
    model, inputs = tiny("llava", batch=2, dtype=torch.float64)
    trained = model.model.vision_tower.get_submodule("encoder.layers.0.mlp.fc1").weight
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    found = []
    with parse(method)(model) as run:
        for reentrant in (None, False, True):
            if reentrant is not None:
                enable({"use_reentrant": reentrant})
            model.train().zero_grad()
            if any(map(checkpoints_hooks, model.model.language_model.layers)):
                pytest.skip("gradient checkpointing is refused before transformers 5.23")
            loss = model(**inputs).logits[:, -1].logsumexp(-1).sum()
            loss.backward()
            found.append(trained.grad.clone())
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        kept, way = run.trace.kept(), torch.randn(trained.shape, generator=torch.Generator().manual_seed(0)).double()
        values = []
        for step in (1e-3, -2e-3):
            with torch.no_grad():
                trained += step * way
                values.append(model(**inputs).logits[:, -1].logsumexp(-1).sum().item())
    if method.startswith("visionzip"):  # the weights of merges follow the scores, which get no gradients
        assert torch.equal(run.trace.kept(), kept)
        assert (values[0] - values[1]) / 2e-3 == pytest.approx((found[0] * way).sum().item(), rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_states_and_caches_are_released(method):
    model, inputs = tiny("llava")
    states = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: states.append(weakref.ref(k["inputs_embeds"])), with_kwargs=True
    )
    handle = eg.attach(model, parse(method))
    cache = generate(model, inputs)[2]
    keys = weakref.ref(cache.layers[3].keys)
    del cache
    handle.remove()
    hook.remove()
    gc.collect()
    assert keys() is None
    assert all(s() is None for s in states)


def test_only_generate_repeats_a_selection():
    """A longer prompt with the same beginning is another prompt."""
    model, inputs = tiny("llava")
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[77, 78, 79, 80]])], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(1, 4, dtype=torch.long)], 1),
    }
    with torch.no_grad():
        with eg.FastV(keep=3)(model) as run:
            model(**longer, use_cache=False)
            alone = run.trace.kept().tolist()
        with eg.FastV(keep=3)(model) as run:
            model(**inputs, use_cache=False)
            model(**longer, use_cache=False)
            assert run.trace.kept().tolist() == alone


def test_scores_are_float32_under_autocast():
    model, inputs = tiny("llava")
    seen = []

    class Watching(eg.FastV):
        def score(self, view):
            rows = view.states.rows(view.last)[0]
            exact = view.states.query[0, :, view.last[0]].double() @ view.states.key[0].double().repeat_interleave(
                2, 0
            ).transpose(1, 2)
            allowed = rows > 0
            logits = (exact * view.states.scaling).masked_fill(~allowed, float("-inf"))
            seen.append((rows.double() - logits.softmax(-1)).abs().max())
            return super().score(view)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Watching(keep=4)(model):
        model(**inputs)
    assert seen[0] < 1e-6


def test_sinks_are_left_out_when_pruning():
    model, inputs = tiny("llava")
    with eg.FastV(keep=8)(model) as run:
        generate(model, inputs, 1)
        plain = set(run.trace.kept().tolist())
    with eg.FastV(keep=8, debias=eg.Debias(sinks=SinkMask(ratio=1.05)))(model) as run:
        generate(model, inputs, 1)
        assert set(run.trace.kept().tolist()) != plain


@pytest.mark.parametrize("source", [None, "previous"])
def test_trends_are_for_attention_only(source):
    class Central(eg.HiMAP):
        def stages(self, layers):
            return [eg.Stage(1, source), eg.Stage(2, "previous")]

        def score(self, view):
            return view.features.float().norm(dim=-1)

    model, inputs = tiny("llava")
    with Central(keep=(9, 4), debias=eg.Debias(trend=Exponential(3.0)))(model) as run:
        generate(model, inputs, 1)
    first, second = (stage.rows[0] for stage in run.trace.stages)
    assert torch.equal(first.raw, first.scores) == (source is None)
    assert torch.equal(second.raw, second.scores)  # HiMAP says that its second stage is not text's


def test_a_wrapper_is_looked_through():
    """PEFT models hand out the model whose forward runs."""
    model, inputs = tiny("llava")

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.config = model.config

        def get_base_model(self):
            return self.inner

        def generate(self, **kwargs):
            return self.inner.generate(**kwargs)

    wrapper = Wrapper()
    with eg.FastV(keep=5)(wrapper) as run:
        wrapper.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert run.trace.visual_tokens()[-1] == 5


def test_an_average_budget_needs_three_stages():
    with pytest.raises(ConfigError, match="three stages"):
        parse("sparsevlm:keep=6,layers=[1,2,3,4]")
