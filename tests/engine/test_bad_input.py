"""Wrong use is refused with an error that names the fix."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from transformers.cache_utils import Cache, QuantizedLayer

import evengaze as eg
from evengaze.compat import cache_argument
from evengaze.errors import (
    AttachError,
    ConfigError,
    LayoutError,
    LayoutWarning,
    NothingPrunedError,
    ScoreError,
    UnsupportedModelError,
)
from evengaze.testing import tiny
from reference import generate


@pytest.mark.parametrize("keep", [0, -3, -0.5, 0.0, 1.5])
def test_budget_out_of_range(keep):
    with pytest.raises(ConfigError, match="keep"):
        eg.FastV(keep=keep)


@pytest.mark.parametrize(("layer", "fix"), [(6, "layers 0 to 5"), (99, "layers 0 to 5")])
def test_layer_outside_the_model(layer, fix):
    model, _ = tiny("llava")
    with pytest.raises(ConfigError, match=fix):
        eg.FastV(keep=4, layer=layer)(model)
    assert not model.model.language_model.layers[0]._forward_pre_hooks


def test_layer_zero_has_no_attention_before_it():
    with pytest.raises(ConfigError, match=">= 1"):
        eg.FastV(keep=4, layer=0)


def test_attached_twice():
    model, inputs = tiny("llava")
    with eg.FastV(keep=4)(model):
        with pytest.raises(AttachError, match=r"remove\(\)"):
            eg.FastV(keep=2)(model)
        generate(model, inputs)
    handle = eg.attach(model, eg.FastV(keep=4))
    handle.remove()
    handle.remove()
    eg.attach(model, eg.FastV(keep=4)).remove()


def test_images_without_placeholders():
    model, inputs = tiny("llava")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, 7)
    with pytest.raises((LayoutError, ValueError), match="image"), eg.FastV(keep=4)(model):
        generate(model, inputs)


def test_embeddings_hide_where_pictures_are():
    model, inputs = tiny("llava")
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, 7)
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": inputs["attention_mask"]}
    expected = model(**embedded).logits
    with eg.FastV(keep=4)(model) as run:
        with pytest.warns(LayoutWarning, match="layout=") as found:
            assert torch.equal(model(**embedded).logits, expected)
            generate(model, embedded, use_cache=False)
        assert len(found) == 1
        assert run.trace is None
    span = eg.VisualLayout.from_spans([(4, 20)], (4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with eg.FastV(keep=4)(model) as run:
            generate(model, {"input_ids": ids})  # text that is known to be text
            generate(model, inputs)
        with eg.FastV(keep=4)(model, layout=span) as run:
            generate(model, embedded)
        assert run.trace.visual_tokens()[-1] == 4
        with eg.methods.parse("dense")(model):
            generate(model, embedded)


def test_hidden_attention_is_named(monkeypatch):
    model, inputs = tiny("llama")
    attention = model.model.layers[1].self_attn

    def closed(hidden_states, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(attention, "forward", closed)
    layout = eg.VisualLayout.from_spans([(4, 20)], (4, 4))
    with pytest.raises(AttachError, match="hidden"), eg.FastV(keep=4)(model, layout=layout):
        generate(model, inputs)


def test_unknown_attention_implementation():
    model, _ = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = "mystery"
    layout = eg.VisualLayout.from_spans([(4, 20)], (4, 4))
    with pytest.raises(AttachError, match="sdpa"):
        eg.FastV(keep=4)(model, layout=layout)


def test_chunked_prefill():
    model, inputs = tiny("llava")
    with pytest.raises(ConfigError, match="prefill_chunk_size"), eg.FastV(keep=4)(model):
        generate(model, inputs, prefill_chunk_size=8)


class Halved(QuantizedLayer):
    def _quantize(self, tensor, axis=0):
        return tensor.half()

    def _dequantize(self, q_tensor):
        return q_tensor.float()


def test_quantized_caches():
    model, inputs = tiny("llava")
    layers = len(model.model.language_model.layers)
    caches = [Cache(layers=[Halved() for _ in range(layers)]), Cache(layer_class_to_replicate=Halved)]
    with eg.FastV(keep=4)(model):
        for cache in caches:
            with pytest.raises(ConfigError, match="cache_implementation"):
                generate(model, inputs, **cache_argument(model, cache))
        generate(model, inputs)


def test_nan_scores():
    model, inputs = tiny("llava")

    class Odd(eg.FastV):
        def score(self, view):
            return super().score(view) * float("nan")

    with pytest.raises(ScoreError, match="NaN"), Odd(keep=4)(model):
        generate(model, inputs)


def test_scores_of_the_wrong_shape():
    model, inputs = tiny("llava")

    class Odd(eg.FastV):
        def score(self, view):
            return super().score(view)[:, :3]

    with pytest.raises(ScoreError, match="scored"), Odd(keep=4)(model):
        generate(model, inputs)


def test_layout_that_does_not_fit_the_call():
    model, inputs = tiny("llama")
    with (
        pytest.raises(LayoutError, match="reaches"),
        eg.FastV(keep=4)(model, layout=eg.VisualLayout.from_spans([(40, 56)], (4, 4))),
    ):
        generate(model, inputs)
    with (
        pytest.raises(LayoutError, match="rows"),
        eg.FastV(keep=4)(model, layout=eg.VisualLayout.from_spans([(4, 20), (4, 20)], (4, 4))),
    ):
        generate(model, inputs)


def test_bare_decoder_needs_a_layout():
    model, _ = tiny("llama")
    with pytest.raises(UnsupportedModelError, match="layout"):
        eg.FastV(keep=4)(model).remove()


@pytest.mark.parametrize(
    ("spans", "grid", "problem"),
    [
        ([(4, 19)], (4, 4), "multiple"),
        ([(4, 4)], (4, 4), "empty"),
        ([[(4, 20), (10, 26)]], (4, 4), "overlaps"),
        ([[(4, 20)]], [(4, 4), (4, 4)], "grids"),
        ([(4, 20)], [], "grids"),
        ([(4, 20)], (0, 4), "at least one"),
    ],
)
def test_spans_that_make_no_sense(spans, grid, problem):
    with pytest.raises(LayoutError, match=problem):
        eg.VisualLayout.from_spans(spans, grid)


@pytest.mark.parametrize("more", ["padding", "image_sizes"])
@pytest.mark.parametrize("entries", [1, 3])
def test_entries_for_other_rows_than_there_are(more, entries):
    entry = {"padding": [0.0] * 16, "image_sizes": (8, 6)}[more]
    with pytest.raises(LayoutError, match=f"{more} has {entries} entries for 2 rows"):
        eg.VisualLayout.from_spans([(4, 20), (4, 20)], (4, 4), **{more: [entry] * entries})


def test_numbers_of_numpy_are_numbers():
    four, twenty = np.int64(4), np.int64(20)
    layout = eg.VisualLayout.from_spans([(four, twenty)], (four, four), image_sizes=[(twenty, four)])
    assert layout.rows[0].span == (4, 20) and layout.rows[0].images[0].grid == (4, 4)


def test_layers_that_never_run_are_noticed():
    model, inputs = tiny("llama")
    model.model.config.num_hidden_layers = 3
    layout = eg.VisualLayout.from_spans([(4, 20)], (4, 4))
    with pytest.raises(NothingPrunedError, match="layers"), eg.FastV(keep=4, layer=5)(model, layout=layout):
        model(**inputs, use_cache=False)


@pytest.mark.parametrize(
    "given",
    [object(), None, "llava-hf/llava-1.5-7b-hf", torch.nn.Linear(2, 2)],
    ids=["object", "nothing", "name", "layer"],
)
def test_what_is_no_model_is_refused_by_name(given):
    with pytest.raises(UnsupportedModelError, match="give a transformers model"):
        eg.FastV(keep=4)(given)
