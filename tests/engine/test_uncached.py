"""Pictures are encoded once and read many times: generations without a cache, own loops, features passed on."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.nn.functional import pad

import evengaze as eg
from evengaze.errors import ConfigError, LayoutError
from evengaze.methods import parse
from evengaze.testing import tiny

FAMILIES = ["llava", "qwen2_5_vl", "video_llava", "idefics3", "lfm2_vl"]  # the last is found by itself
METHODS = ["fastv-recompute:keep=3", "himap-recompute:keep=[3,2],layers=[2,4]"]
STEPS = 4


def longer(inputs, tokens):
    """The inputs with tokens behind the prompt, as a prompt of its own."""
    flags = {name: int(name == "attention_mask") for name in inputs if inputs[name].shape == inputs["input_ids"].shape}
    grown = {name: pad(inputs[name], (0, tokens.shape[1]), value=fill) for name, fill in flags.items()}
    return {**inputs, **grown, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}


def ranked_anew(model, inputs, handle):
    """Greedy decoding by calls that encode the pictures each time: tokens, and what every call kept."""
    tokens, kept = inputs["input_ids"][:, :0], []
    for _ in range(STEPS):
        with torch.no_grad():
            logits = model(**longer(inputs, tokens), use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        kept.append(handle.trace.kept())
    return tokens, kept


def encoded(model, inputs):
    """Features of a call's pictures as `mm_encoder_outputs`, and what is left of the inputs."""
    pixels = {k: v for k, v in inputs.items() if "pixel" in k or "grid" in k or k == "image_sizes"}
    with torch.no_grad():
        features = model.base_model.get_image_features(**pixels, return_dict=True)
    return {"image": features}, {k: v for k, v in inputs.items() if k not in pixels}


def loop(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **given):
    """A decoding loop without a cache, as `custom_generate` takes it."""
    given = {name: v for name, v in given.items() if name not in ("cache", "past_key_values")} | {"use_cache": False}
    for _ in range(STEPS):
        out = model(**model.prepare_inputs_for_generation(input_ids, **given))
        input_ids = torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], 1)
        given = model._update_model_kwargs_for_generation(out, given)
    return input_ids


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_step_ranks_anew_the_pictures_that_were_encoded_once(family, method, batch):
    model, inputs = tiny(family, batch)
    with parse(method)(model) as run:
        expected, kept = ranked_anew(model, inputs, run)
        run.traces.clear()
        found = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, use_cache=False)
        assert torch.equal(found[:, -STEPS:], expected)
        for trace, by_call in zip(run.traces, kept, strict=True):
            assert torch.equal(trace.kept(), by_call)
        options = {"num_return_sequences": 2, "do_sample": True, "top_k": 1, "use_cache": False}
        several = model.generate(**inputs, max_new_tokens=STEPS, **options)
        assert torch.equal(several[::2, -STEPS:], expected)
        own = model.generate(**inputs, max_new_tokens=STEPS, custom_generate=loop)
        assert torch.equal(own[:, -STEPS:], expected)


@pytest.mark.parametrize("method", ["fastv:keep=3", "pyramiddrop:layers=[2,4],keep=[8,4]", "visionzip:keep=5"])
def test_a_loop_given_to_generate_goes_on_with_the_prompts_selection(method):
    """As transformers' own loop does, with and without a cache."""
    model, inputs = tiny("llava", 2)
    with parse(method)(model) as run:
        expected = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        kept = run.trace.kept()
        assert torch.equal(model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, use_cache=False), expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=STEPS, custom_generate=loop), expected)
        assert torch.equal(run.trace.kept(), kept)


@pytest.mark.parametrize("method", ["fastv:keep=3", "visionzip:keep=5"])
def test_features_are_known_wherever_they_are_passed_on(method):
    """In any order, as often as one likes, from other threads."""
    model, inputs = tiny("llava", 2)
    alone = [
        {k: v[row : row + 1] if k != "input_ids" else inputs["input_ids"][row : row + 1] for k, v in inputs.items()}
        for row in range(2)
    ]
    with parse(method)(model) as run:
        expected, kept = [], []
        for one in alone:
            with torch.no_grad():
                expected.append(model(**one).logits)
            kept.append(run.trace.kept())
        outputs = [encoded(model, one) for one in alone]
        for row in (1, 0, 0, 1):
            features, rest = outputs[row]
            with torch.no_grad():
                assert torch.equal(model(**rest, mm_encoder_outputs=features).logits, expected[row])
            assert torch.equal(run.trace.kept(), kept[row])
            generated = model.generate(**rest, mm_encoder_outputs=dict(features), max_new_tokens=2, do_sample=False)
            assert torch.equal(generated[:, -2], expected[row][:, -1].argmax(-1))
        found = []

        def elsewhere(features, rest):
            with torch.no_grad():
                found.append(model(**rest, mm_encoder_outputs=features).logits)

        thread = threading.Thread(target=elsewhere, args=outputs[0])
        thread.start()
        thread.join()
        assert torch.equal(found[0], expected[0])


def test_features_of_images_and_videos_may_be_encoded_apart():
    model, inputs = tiny("video_llava")
    _, more = tiny("video_llava", video=True)
    ids = torch.cat([more["input_ids"], inputs["input_ids"]], 1)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = {k: v for k, v in {**inputs, **more}.items() if k.startswith("pixel")}
    with parse("visionzip:keep=5")(model):
        with torch.no_grad():
            expected = model(**both, **pixels).logits
        video = model.base_model.get_video_features(pixels["pixel_values_videos"], return_dict=True)
        image = model.base_model.get_image_features(pixels["pixel_values"], return_dict=True)
        with torch.no_grad():
            assert torch.equal(model(**both, mm_encoder_outputs={"image": image, "video": video}).logits, expected)


def test_features_that_nobody_holds_are_forgotten_and_those_from_elsewhere_refused():
    model, inputs = tiny("llava")
    before, rest = encoded(model, inputs)
    with eg.FastV(keep=3)(model) as run:
        with pytest.raises(LayoutError, match="before the images are encoded"):
            model(**rest, mm_encoder_outputs=before)
        features, _ = encoded(model, inputs)
        model(**rest, mm_encoder_outputs=features)
        gone = weakref.ref(features["image"].pooler_output[0])
        del features
        model(**inputs)
        gc.collect()
        assert gone() is None
        features, _ = encoded(model, inputs)
    assert run.trace is not None
    with eg.FastV(keep=3)(model), pytest.raises(LayoutError, match="before the images are encoded"):
        model(**rest, mm_encoder_outputs=features)


def test_masks_hide_nothing_from_a_layer_with_a_state():
    model, _ = tiny("lfm2_vl")
    with pytest.raises(ConfigError, match="carry a state"):
        parse("fastv-masked:keep=3,layer=2")(model)
