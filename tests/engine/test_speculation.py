"""Drafts, beams without a cache, and what `generate` is refused before anything runs."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import StaticLayer

import evengaze as eg
from evengaze.compat import cache_argument, cache_of
from evengaze.errors import ConfigError, LayoutError
from evengaze.methods import get, parse
from evengaze.testing import tiny
from evengaze.testing.matrix import METHODS
from evengaze.testing.models import layout_of
from reference import dropped_from, generate, masked_from

FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3"]
UNTRIMMED = [name for name in METHODS if not get(name)(**METHODS[name]).stages(6)[0].trims_below]


def method(name):
    return get(name)(**METHODS[name])


def drafters(family, model):
    """Models that draft: one that is often right, one that is always wrong, and the model itself."""
    good, _ = tiny(family, seed=1)
    with torch.no_grad():
        for mine, its in zip(good.parameters(), model.parameters(), strict=True):
            mine.copy_(its + 0.02 * mine)
    bad, _ = tiny(family, seed=2)
    return {"good": good, "bad": bad, "itself": model}


def repeating(inputs):
    """A prompt whose last words have been said before, so that they can be looked up."""
    said = torch.tensor([[91, 92, 93, 94, 91, 92]])
    more = {
        k: torch.cat([v, said if k == "input_ids" else torch.zeros_like(said)], 1)
        for k, v in inputs.items()
        if v.shape == inputs["input_ids"].shape
    }
    return {**inputs, **more, "attention_mask": torch.ones_like(more["input_ids"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_nothing(family):
    """Tokens, logits and what was kept are those of greedy decoding, with accepted and with rejected candidates."""
    model, inputs = tiny(family)
    inputs = repeating(inputs)
    speculations = [{"assistant_model": draft} for draft in drafters(family, model).values()]
    for name in UNTRIMMED:
        with method(name)(model) as run:
            tokens, logits, _ = generate(model, inputs, 9)
            kept, length = run.trace.kept(), run.trace.length
            for options in (*speculations, {"prompt_lookup_num_tokens": 3}):
                found, drafted, cache = generate(model, inputs, 9, **options)
                assert run.trace.length > length, "the draft was in the prefill"
                assert torch.equal(run.trace.kept(), kept), name
                assert torch.equal(found, tokens), name
                assert (drafted - logits).abs().max() / logits.abs().max() < 1e-5, name
                assert int(cache.get_seq_length()) == length + 8


def test_drafts_by_a_model_that_is_pruned_itself():
    model, inputs = tiny("llava")
    draft = drafters("llava", model)["good"]
    with eg.FastV(keep=5)(model):
        tokens = generate(model, inputs, 9)[0]
        with eg.DivPrune(keep=4)(draft):
            assert torch.equal(generate(model, inputs, 9, assistant_model=draft)[0], tokens)
    dense = generate(model, inputs, 9)[0]
    with eg.DivPrune(keep=4)(draft):
        assert torch.equal(generate(model, inputs, 9, assistant_model=draft)[0], dense)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_drafts_by_a_model_without_eyes(cache):
    """It reads the placeholders as text; static caches are cropped alike, where transformers can crop them."""
    if cache and not hasattr(StaticLayer, "crop"):
        pytest.skip("this release of transformers cannot crop static caches")
    model, inputs = tiny("llava")
    draft, _ = tiny("llama", seed=3)
    with parse("sparsevlm:layers=[1,3],keep=[9,4]")(model):
        tokens, logits, _ = generate(model, inputs, 9)
        found, drafted, _ = generate(model, inputs, 9, assistant_model=draft, **cache)
    assert torch.equal(found, tokens) and torch.allclose(drafted, logits, atol=1e-4)


@pytest.mark.parametrize("family", ["lfm2_vl", "glm4v", "qwen2_5_omni_thinker"])
def test_drafts_and_beams_where_the_family_is_found_by_itself(family):
    """The first has convolutions, whose states are rolled back as well."""
    model, inputs = tiny(family)
    inputs = repeating(inputs)
    with method("fastv")(model):
        tokens = generate(model, inputs, 9)[0]
        assert torch.equal(generate(model, inputs, 9, prompt_lookup_num_tokens=3)[0], tokens)
        cached = model.generate(**inputs, max_new_tokens=6, num_beams=3)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, num_beams=3, use_cache=False), cached)


def test_speculative_sampling_draws_from_the_pruned_model():
    """With one token to draw from, accepted or drawn anew, it is the greedy one."""
    model, inputs = tiny("llava")
    draft, _ = tiny("llava", seed=1)
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 1}
    with eg.FastV(keep=5)(model):
        greedy = generate(model, inputs, 8)[0]
        assert torch.equal(model.generate(**inputs, **options, assistant_model=draft)[:, -8:], greedy)


def test_candidates_are_no_part_of_a_methods_question():
    seen = []

    class Watching(eg.FastV):
        name = "watching"

        def score(self, view):
            seen.append((int(view.last), view.text.index.tolist(), view.question.shape[1]))
            return super().score(view)

    model, inputs = tiny("llava")
    with Watching(keep=5)(model):
        generate(model, inputs, 6)
        generate(model, inputs, 6, assistant_model=drafters("llava", model)["bad"])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("pictures", [False, True])
def test_a_draft_goes_on_with_a_conversation(pictures):
    """The cache is cropped as ever; new pictures are ranked as without a draft."""
    model, inputs = tiny("llava")
    draft = drafters("llava", model)["bad"]
    pixels = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(9))
    new = [11, *[290] * 16, 91, 92, 93, 91, 92] if pictures else [91, 92, 93, 91, 92]
    results, kept = [], []
    with eg.FastV(keep=5)(model) as run:
        for options in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
            first, _, cache = generate(model, inputs, 4)
            ids = torch.cat([inputs["input_ids"], first, torch.tensor([new])], 1)
            past = int(cache.get_seq_length())
            turn = {"input_ids": ids[:, past:] if options else ids, "attention_mask": torch.ones_like(ids)}
            turn |= {"pixel_values": pixels} if pictures else {}
            results.append(generate(model, turn, 6, **options, **cache_argument(model, cache))[0])
            kept.append(run.trace.kept().tolist())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("masked", [False, True])
def test_a_draft_on_a_cache_wants_the_new_tokens_only(masked):
    """transformers reads all it is given behind what the cache holds; without a pruner, the answer is another one."""
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model):
        first, _, cache = generate(model, inputs, 4)
    ids = torch.cat([inputs["input_ids"], first, torch.tensor([[91, 92, 93, 91, 92]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if masked else {"input_ids": ids}
    refused(model, turn, "new tokens only", prompt_lookup_num_tokens=3, **cache_argument(model, cache))


def test_drafts_where_the_layout_was_given():
    model, inputs = tiny("llama")
    inputs = repeating(inputs)
    bad = drafters("llama", model)["bad"]
    with method("fastv")(model, layout=layout_of(inputs)) as run:
        tokens = generate(model, inputs, 9)[0]
        kept = run.trace.kept()
        for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": bad}, {"assistant_model": model}):
            assert torch.equal(generate(model, inputs, 9, **options)[0], tokens)
            assert torch.equal(run.trace.kept(), kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_in_later_text_is_text(family):
    """As the dense model takes it: only a call that is given pictures can hold any."""
    model, inputs = tiny(family)
    token = getattr(model.config, "image_token_id", 290)
    with method("fastv")(model) as run:
        first, _, cache = generate(model, inputs, 3)
        trace = run.trace
        extra = torch.tensor([[11, token, 12, token, 13]])
        ids = torch.cat([inputs["input_ids"], first, extra], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with_token = generate(model, turn, 3, **cache_argument(model, cache))[1]
        assert run.trace is trace
    assert with_token.isfinite().all()


def test_a_placeholder_in_later_text_is_exact():
    model, inputs = tiny("llava")
    slow, _ = tiny("llava", attention="eager")
    extra = torch.tensor([[11, 290, 12, 290, 13]])
    with eg.FastV(keep=5)(model) as run:
        first, _, cache = generate(model, inputs, 3)
        ids = torch.cat([inputs["input_ids"], first, extra], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = generate(model, turn, 3, **cache_argument(model, cache))[1]
    embed = slow.get_input_embeddings()
    states = embed(ids).detach()
    with torch.no_grad():
        features = slow.model.get_image_features(pixel_values=inputs["pixel_values"])
        features = getattr(features, "pooler_output", features)
        features = features[0] if isinstance(features, (list, tuple)) else features
        states[0, (inputs["input_ids"][0] == 290).nonzero()[:, 0]] = features.reshape(16, -1)
    with masked_from(slow, dropped_from(run.trace)):
        out = slow(inputs_embeds=states, use_cache=False).logits
    assert torch.allclose(out[:, -1], found[:, 0], atol=1e-4)


def test_pictures_encoded_elsewhere_are_still_refused():
    model, inputs = tiny("llava")
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"])
    call = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with eg.FastV(keep=5)(model), pytest.raises(LayoutError, match="encoded"):
        model(**call, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_without_a_cache(family, options):
    """More steps than selections are remembered: the prompt's own stays."""
    model, inputs = tiny(family, 2)
    for name in UNTRIMMED if "num_return_sequences" not in options else ["fastv"]:
        with method(name)(model):
            cached = model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)
            uncached = model.generate(**inputs, max_new_tokens=10, do_sample=False, use_cache=False, **options)
        assert torch.equal(cached, uncached), name


def test_sampling_without_a_cache():
    model, inputs = tiny("llava", 2)
    options = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 2}
    with eg.FastV(keep=5)(model) as run:
        torch.manual_seed(3)
        cached = model.generate(**inputs, **options)
        torch.manual_seed(3)
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)
        assert run.trace.visual_tokens()[-1] == 5


def refused(model, inputs, match, spec="fastv:keep=5", **options):
    """Before the vision tower has run."""
    ran = []
    hook = next(m for m in model.modules() if "Vision" in type(m).__name__).register_forward_pre_hook(
        lambda *_: ran.append(1)
    )
    try:
        with parse(spec)(model), pytest.raises(ConfigError, match=match):
            model.generate(**inputs, max_new_tokens=3, **options)
    finally:
        hook.remove()
    assert not ran


def test_gradient_checkpointing_drops_what_generate_counts_on():
    model, inputs = tiny("llava", 2)
    with eg.FastV(keep=5)(model):
        expected = generate(model, inputs)[0]
        uncached = generate(model, inputs, use_cache=False)[0]
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    refused(model, inputs, "gradient checkpointing")
    refused(model, inputs, "gradient checkpointing", generation_config=GenerationConfig(max_new_tokens=3))
    with eg.FastV(keep=5)(model):
        assert torch.equal(generate(model, inputs, use_cache=False)[0], uncached)
        model.eval()
        assert torch.equal(generate(model, inputs)[0], expected)


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize(
    ("option", "value"), [("assistant_early_exit", 2), ("use_mtp", True), ("speculation_type", "dflash")]
)
def test_drafts_that_read_what_was_dropped(option, value, config):
    model, inputs = tiny("llava")
    options = {option: value}
    if config:
        options = {"generation_config": GenerationConfig(**options)}
        if getattr(options["generation_config"], option, None) is None:
            pytest.skip("not in this release of transformers")
    refused(model, inputs, "assistant_model that reads", **options)


@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_methods_that_reach_below_refuse_drafts(how):
    model, inputs = tiny("llava")
    options = {"assistant_model": model} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    refused(model, inputs, "draft", "tokencarve:keep=5", **options)


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_states_by_place_are_refused_with_a_draft(wanted):
    model, inputs = tiny("llava")
    options = {wanted: True, "return_dict_in_generate": True}
    refused(model, inputs, wanted, prompt_lookup_num_tokens=3, **options)
    with eg.FastV(keep=5)(model):
        model.generate(**inputs, max_new_tokens=2, **options)


def test_prompts_that_are_read_in_both_directions_refuse_drafts():
    """Not exact in the dense model either."""
    model, inputs = tiny("paligemma")
    refused(model, inputs, "both directions", prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("call", ["generate", "generate_batch"])
def test_continuous_batching_is_refused(call):
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model), pytest.raises(ConfigError, match="continuous batching"):
        if call == "generate":
            model.generate(**inputs, max_new_tokens=2, cache_implementation="paged")
        else:
            model.generate_batch(inputs["input_ids"].tolist())
    with parse("dense")(model):
        generate(model, inputs, 2)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("spec", ["pyramiddrop:layers=[2,4],keep=[8,4]", "sparsevlm:layers=[1,3],keep=[9,4]"])
def test_right_padding_would_make_positions_negative(spec, given):
    model, inputs = tiny("llava", 3, side="right")
    if not given:
        inputs.pop("attention_mask")  # generate finds the padding by its token
    refused(model, inputs, "left", spec)


def test_right_padding_where_positions_stay():
    """As transformers does it: with a warning, and at the places where the padding ends."""
    model, inputs = tiny("llava", 3, side="right")
    slow, _ = tiny("llava", 3, "eager", side="right")
    with eg.FastV(keep=5)(model) as run:
        found = generate(model, inputs, 3)[1]
    with masked_from(slow, dropped_from(run.trace)):
        assert torch.allclose(generate(slow, inputs, 3, use_cache=False)[1], found, atol=1e-4)
    model, inputs = tiny("qwen2_5_vl", 3, side="right")
    with parse("pyramiddrop:layers=[2,4],keep=[8,4]")(model):  # positions of several axes are not moved
        generate(model, inputs, 2)


@pytest.mark.parametrize("spec", ["pyramiddrop:layers=[2,4],keep=[8,4]", "sparsevlm:layers=[1,3],keep=[9,4]"])
def test_right_padding_in_a_loop_of_ones_own(spec):
    """Positions that the caller counts are moved down, and never below 0."""
    model, left = tiny("llava", 3)
    _, right = tiny("llava", 3, side="right")
    with torch.no_grad(), parse(spec)(model):
        expected = generate(model, left, 3)[1]
        real = right["attention_mask"]
        out = model(**right, use_cache=True)
        last = real.sum(1) - 1
        logits = out.logits[torch.arange(3), last]
        cache = cache_of(out)
        for step in range(3):
            assert torch.allclose(logits, expected[:, step], atol=1e-4)
            real = torch.cat([real, torch.ones(3, 1, dtype=torch.long)], 1)
            last = last + 1
            logits = model(
                input_ids=logits.argmax(-1, keepdim=True),
                attention_mask=real,
                position_ids=last[:, None],
                **cache_argument(model, cache),
            ).logits[:, -1]
