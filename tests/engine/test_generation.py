"""Everything that `generate` can do around a pruned cache."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import evengaze as eg
from evengaze.compat import cache_argument, cache_of
from evengaze.methods import parse
from evengaze.testing import tiny
from reference import decoder_of, dropped_from, generate, masked_from

METHODS = ["fastv:keep=5", "pyramiddrop:layers=[2,4],keep=[8,4]", "uniform:keep=5"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_without_a_cache_the_selection_is_frozen(method, batch):
    model, inputs = tiny("llava", batch=batch)
    with parse(method)(model):
        cached = generate(model, inputs)[1]
        uncached = generate(model, inputs, use_cache=False)[1]
    assert (cached - uncached).abs().max() < 1e-4


def test_a_new_prompt_without_a_cache_is_ranked_anew():
    model, inputs = tiny("llava")
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    with eg.FastV(keep=5)(model) as run:
        generate(model, inputs, use_cache=False)
        first = run.trace.kept().tolist()
        generate(model, other, use_cache=False)
        second = run.trace.kept().tolist()
        generate(model, other)
        assert second == run.trace.kept().tolist() != first


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("batch", [1, 3])
def test_beam_search(batch, options):
    model, inputs = tiny("llava", batch=batch)
    slow, _ = tiny("llava", batch=batch, attention="eager")
    with eg.FastV(keep=5)(model) as run:
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    plan = dropped_from(run.trace)
    with masked_from(slow, plan):
        expected = slow.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False, **options)
    assert torch.equal(out, expected)


def test_sampling_with_several_sequences():
    model, inputs = tiny("llava", batch=3)
    slow, _ = tiny("llava", batch=3, attention="eager")
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5}
    torch.manual_seed(3)
    with eg.FastV(keep=5)(model) as run:
        out = model.generate(**inputs, **options)
    torch.manual_seed(3)
    with masked_from(slow, dropped_from(run.trace)):
        expected = slow.generate(**inputs, **options, use_cache=False)
    assert torch.equal(out, expected)


def test_prompt_lookup_equals_greedy():
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model):
        greedy = generate(model, inputs, 12)[0]
        lookup = generate(model, inputs, 12, prompt_lookup_num_tokens=3)[0]
    assert torch.equal(greedy, lookup)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", [*METHODS, "tokencarve:keep=5"])
def test_static_cache(method, batch):
    model, inputs = tiny("llava", batch=batch)
    with parse(method)(model):
        dynamic = generate(model, inputs)[1]
        options = {"cache_implementation": "static", "disable_compile": True}
        static = generate(model, inputs, **options)[1]
        again = generate(model, inputs, **options)[1]  # generate reuses and resets its static cache
    assert (dynamic - static).abs().max() < 1e-4
    assert torch.equal(static, again)


@pytest.mark.parametrize("static", [False, True])
def test_several_stages_may_trim_the_caches_below(static):
    class Reaching(eg.HiMAP):
        def stages(self, layers):
            return [replace(stage, trims_below=True) for stage in super().stages(layers)]

    pruner = Reaching(keep=(8, 4), layers=(2, 4))
    model, inputs = tiny("llava", batch=3)
    mask = inputs["attention_mask"].bool()
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with pruner(model):
        _, together, cache = generate(model, inputs, **options)
        if not static:
            assert {layer.keys.shape[-2] for layer in cache.layers} == {mask.shape[1] - 16 + 4 + 5}
            assert set(pruner.schedule(6, 16).cached) == {4}
        assert {int(layer.get_seq_length()) for layer in cache.layers} == {mask.shape[1] + 5}
        for b in range(3):
            alone = {k: v[b : b + 1] for k, v in inputs.items()}
            alone = {k: v if k == "pixel_values" else v[:, mask[b]] for k, v in alone.items()}
            assert (generate(model, alone, **options)[1][0] - together[b]).abs().max() < 1e-4


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="torch 2.6 does not compile the dense model, either (transformers 5.21)",
)
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastv:keep=5", "pyramiddrop:layers=[2,4],keep=[8,4]", "tokencarve:keep=5"])
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_decoding_is_one_graph(method, batch):
    model, inputs = tiny("llava", batch=batch)
    with parse(method)(model):
        eager = generate(model, inputs)[1]
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with parse(method)(model):
        for _ in range(2):
            compiled = generate(model, inputs, cache_implementation="static", compile_config=config)[1]
            assert (eager - compiled).abs().max() < 1e-4
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def turn(first: torch.Tensor, extra: list[int], images: bool, model, inputs) -> dict:
    """Inputs of a second turn: everything so far, new text and, if asked, a further image."""
    new = torch.tensor(extra).expand(len(first), -1)
    if images:
        picture = torch.full((len(first), 16), model.config.image_token_id)
        new = torch.cat([new[:, :2], picture, new[:, 2:]], 1)
    ids = torch.cat([first, new], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(first), grown, dtype=torch.long)], 1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("static", [False, True])
def test_second_turn_on_the_same_cache(images, batch, static):
    model, inputs = tiny("llava", batch=batch)
    slow, _ = tiny("llava", batch=batch, attention="eager")
    if static:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    else:
        cache = DynamicCache(config=model.config.get_text_config())
    pixels = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(9))
    with eg.FastV(keep=5)(model) as run:
        first = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, **cache_argument(model, cache), disable_compile=True
        )
        plan = dropped_from(run.trace)
        second = turn(first, [11, 12, 13, 14, 15], images, model, inputs)
        extra = {"pixel_values": pixels} if images else {}
        tokens, logits, _ = generate(
            model, {**second, **extra}, 4, **cache_argument(model, cache), disable_compile=True
        )
        if images:
            offset = second["input_ids"].shape[1] - run.trace.length
            later = [
                (layer, torch.nn.functional.pad(dropped, (offset, 0))) for layer, dropped in dropped_from(run.trace)
            ]
            plan = plan + later
    length = second["input_ids"].shape[1]
    plan = [(layer, torch.nn.functional.pad(d, (0, length - d.shape[1]))) for layer, d in plan]
    # The reference sees both pictures in one prompt, in the order of their placeholders row by row.
    both = torch.stack([inputs["pixel_values"], pixels], 1).flatten(0, 1) if images else inputs["pixel_values"]
    with masked_from(slow, plan):
        expected_tokens, expected, _ = generate(slow, {**second, "pixel_values": both}, 4, use_cache=False)
    assert (logits - expected).abs().max() < 1e-4
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_probing_method_sees_an_earlier_turn(batch):
    """The second turn's ranking by the stage layer's own queries and keys includes the keys in the cache."""
    model, inputs = tiny("llava", batch=batch)
    pruner = parse("pyramiddrop:layers=[2],keep=[5]")
    cache = DynamicCache(config=model.config.get_text_config())
    pixels = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(9))
    dense = parse("pyramiddrop:layers=[2],keep=[16]")
    with dense(model):
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, **cache_argument(model, cache))
    second = turn(first, [11, 12, 13, 14, 15], True, model, inputs)
    weights = []

    def record(module, args, out):
        weights.append(out[1])

    slow, _ = tiny("llava", batch=batch, attention="eager")
    handle = decoder_of(slow).layers[2].self_attn.register_forward_hook(record)
    both = torch.stack([inputs["pixel_values"], pixels], 1).flatten(0, 1)
    with torch.no_grad():
        slow(**second, pixel_values=both, use_cache=False)
    handle.remove()
    with pruner(model) as run:
        generate(model, {**second, "pixel_values": pixels}, 1, **cache_argument(model, cache))
    offset = second["input_ids"].shape[1] - run.trace.length
    for b, row in enumerate(run.trace.stages[0].rows):
        columns = run.trace.layout.rows[b].position + offset
        assert torch.allclose(row.raw, weights[0][b, :, -1, columns].mean(0), atol=1e-6)


def test_interleaved_generations_do_not_disturb_each_other():
    model, inputs = tiny("llava", batch=3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with eg.FastV(keep=5)(model), torch.no_grad():
        expected = generate(model, inputs, 3)[1]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        outs = [model(**inputs, position_ids=position, use_cache=True) for _ in range(2)]
        caches = [cache_of(o) for o in outs]
        for cache in caches:
            logits, rows = outs[0].logits[:, -1], mask
            for step in range(3):
                assert (logits - expected[:, step]).abs().max() < 1e-4
                rows = torch.cat([rows, rows.new_ones(len(ids), 1)], 1)
                position = (rows.cumsum(1) - 1)[:, -1:]
                logits = model(
                    input_ids=logits.argmax(-1, keepdim=True),
                    attention_mask=rows,
                    position_ids=position,
                    **cache_argument(model, cache),
                ).logits[:, -1]


def test_layer_zero_is_cut_by_the_same_code():
    model, inputs = tiny("llava", batch=3, images=[1, 1, 2])
    slow, _ = tiny("llava", batch=3, images=[1, 1, 2], attention="eager")
    pruner = parse("uniform:keep=5,layer=0")
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with pruner(model) as run:
            tokens, logits, _ = generate(model, inputs, **options)
        with masked_from(slow, dropped_from(run.trace)):
            expected_tokens, expected, _ = generate(slow, inputs, use_cache=False)
        assert torch.equal(tokens, expected_tokens)
        assert (logits - expected).abs().max() < 1e-4
    assert run.trace.visual_tokens()[0] == 5


@pytest.mark.parametrize("mode", ["inference", "autocast", "float16", "bfloat16"])
def test_precision_and_grad_modes(mode):
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(mode, torch.float32)
    model, inputs = tiny("llava", batch=3, dtype=dtype)
    contexts = {"inference": torch.inference_mode(), "autocast": torch.autocast("cpu", torch.bfloat16)}
    with contexts.get(mode, torch.no_grad()), eg.FastV(keep=5)(model) as run:
        logits = generate(model, inputs)[1]
    assert logits.isfinite().all()
    assert run.trace.visual_tokens()[-1] == 5


@pytest.mark.parametrize("method", METHODS)
def test_offloaded_weights(method):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny("llava", batch=3)
    with parse(method)(model):
        expected = generate(model, inputs)[1]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with parse(method)(model):
        logits = generate(model, inputs)[1]
    assert (logits - expected).abs().max() < 1e-5
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_labels_behind_dropped_tokens_are_ignored(method):
    """Every token behind another is a label here: the prompt, too, and the pictures' placeholders."""
    model, inputs = tiny("llava", batch=3, images=[0, 1, 2])
    real = inputs["attention_mask"].bool()
    real &= real.roll(1, 1)
    labels = inputs["input_ids"].masked_fill(~real, -100)
    given = labels.clone()
    with parse(method)(model) as run:
        out = model(**inputs, labels=labels)
        other = model(**inputs, labels=labels.masked_fill(~real, -5), ignore_index=-5)
    gone = torch.stack([dropped for _, dropped in dropped_from(run.trace)]).any(0)
    expected = labels.masked_fill(gone.roll(1, 1), -100)
    assert torch.equal(labels, given)
    assert int((expected != labels).sum()) == int(gone.sum()) > 0
    flat = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), expected[:, 1:].flatten())
    assert torch.allclose(out.loss, flat) and torch.equal(out.loss, other.loss)
    if run.pruner.positions == "original":
        slow, _ = tiny("llava", batch=3, images=[0, 1, 2], attention="eager")
        with masked_from(slow, dropped_from(run.trace)):
            assert torch.allclose(out.loss, slow(**inputs, labels=expected, use_cache=False).loss, atol=1e-5)
    out.loss.backward()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [*METHODS, "sparsevlm:layers=[1,3],keep=[9,4]"])
def test_logits_keep_their_places(method, side):
    """Rows keep unlike numbers of tokens; those that were dropped, fillers included, are 0."""
    model, inputs = tiny("llava", batch=3, images=[0, 1, 2])
    if side == "right":
        ends = inputs["attention_mask"].argmax(1)
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.stack([row.roll(-int(n)) for row, n in zip(inputs[name], ends, strict=True)])
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), parse(method)(model) as run:
        logits = model(**inputs).logits
        gone = torch.stack([dropped for _, dropped in dropped_from(run.trace)]).any(0)
        moved = any(row.recycled is not None for stage in run.trace.stages for row in stage.rows)
        assert logits.shape[:2] == real.shape
        if not moved:
            assert torch.equal((logits == 0).all(-1) & real, gone)
        first = 0
        for b, count in enumerate([0, 1, 2]):
            pixels = inputs["pixel_values"][first : first + count]
            first += count
            alone = {"input_ids": inputs["input_ids"][b : b + 1, real[b]]}
            alone |= {"pixel_values": pixels} if count else {}
            assert torch.allclose(model(**alone).logits[0], logits[b, real[b]], atol=1e-5)


def test_positions_to_predict_at_count_in_the_whole_prompt():
    model, inputs = tiny("llava")
    with torch.no_grad(), eg.FastV(keep=5)(model):
        full = model(**inputs).logits
        some = torch.tensor([3, 11, 20])
        for keep, expected in ((some, full[:, some]), (1, full[:, -1:]), (20, full[:, -20:])):
            assert torch.allclose(model(**inputs, logits_to_keep=keep).logits, expected, atol=1e-5)
        assert torch.equal(model(**inputs, return_dict=False)[0], full)
        assert model.model(**inputs).last_hidden_state.shape[1] == full.shape[1]
    bare, inputs = tiny("llama")
    with torch.no_grad(), eg.FastV(keep=5)(bare, layout=eg.VisualLayout.from_spans([(4, 20)], (4, 4))):
        for options in ({}, {"return_dict": False}):
            states = bare.model(**inputs, use_cache=False, **options)[0]
            assert int((states == 0).all(-1).sum()) == 11


def test_deepcopy_of_an_attached_model():
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model):
        expected = generate(model, inputs)[1]
    clone = copy.deepcopy(model)
    with eg.FastV(keep=5)(clone):
        assert torch.equal(generate(clone, inputs)[1], expected)


def test_trace_survives_a_file(tmp_path):
    model, inputs = tiny("llava", batch=3, images=[0, 1, 2])
    with parse("sparsevlm:layers=[1,3],keep=[9,4]")(model) as run:
        generate(model, inputs)
    run.trace.save(tmp_path / "trace.json")
    again = eg.Trace.load(tmp_path / "trace.json")
    assert again.to_dict() == json.loads(json.dumps(run.trace.to_dict()))
    assert str(again) == str(run.trace)
    held = zip(run.trace.kv_bytes, run.trace.kv_bytes_unpruned, run.trace.entering, strict=True)
    assert all(now * run.trace.length == before * entering for now, before, entering in held)
    assert sum(run.trace.kv_bytes) < sum(run.trace.kv_bytes_unpruned)


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static"])
def test_unpruned_caches_are_as_large_as_the_trace_says(kind):
    """In a second turn, too, with windows, and in buffers."""
    model, inputs = tiny("gemma3" if kind == "sliding" else "llava")

    def cache():
        config = model.config.get_text_config()
        return StaticCache(config=config, max_cache_len=96) if kind == "static" else DynamicCache(config=config)

    def sizes(cache):
        return [sum(t.numel() * t.element_size() for t in (c.keys, c.values)) for c in cache.layers]

    more = {**inputs, "attention_mask": torch.cat([inputs["attention_mask"]] * 2, 1)}
    dense, pruned = cache(), cache()
    with torch.no_grad():
        for turn in (inputs, more):
            model(**turn, **cache_argument(model, dense))
            with eg.FastV(keep=5, layer=2)(model) as run:
                model(**turn, **cache_argument(model, pruned))
            assert list(run.trace.kv_bytes_unpruned) == sizes(dense)
            assert list(run.trace.kv_bytes) == sizes(pruned)
