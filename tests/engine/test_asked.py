"""What ranks where prompt and answer, or several samples, are one call: each prompt its own pictures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import evengaze as eg
from evengaze.compat import cache_argument, cache_of
from evengaze.errors import ConfigError, LayoutError, QuestionWarning
from evengaze.methods import get
from evengaze.methods.base import Pruner
from evengaze.testing import tiny
from evengaze.testing.matrix import METHODS, greedy
from evengaze.testing.oracle import replayed

STEPS = 5
OTHERS: dict[str, dict[str, Any]] = {
    "random": {"keep": 5},
    "uniform": {"keep": 5},
    "pool": {"keep": 5},
    "tome": {"keep": 5},
    "visionzip": {"keep": 5},
}


def pruner_of(name: str, **more: Any) -> Pruner:
    return get(name)(**{**(METHODS | OTHERS | {"fastv-masked": {"keep": 5}})[name], **more})


def kept(run: Any) -> list[list[int]]:
    return [run.trace.kept(b).tolist() for b in range(len(run.trace.layout))]


def answered(model: Any, inputs: dict[str, Any], run: Any) -> tuple[dict[str, Any], torch.Tensor, list[list[int]]]:
    """The prompt with its own greedy answer behind it, the logits that gave it, and what the prompt kept."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = out.sequences
    longer = ids.shape[1] - inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": ids}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            whole[name] = torch.nn.functional.pad(inputs[name], (0, longer), value=fill)
    return whole, torch.stack(out.logits, 1), kept(run)


def labels_of(whole: dict[str, Any], prompt: int) -> torch.Tensor:
    labels = whole["input_ids"].clone()
    labels[:, :prompt] = -100
    return labels


# -- labels ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "gemma3"])
@pytest.mark.parametrize("name", METHODS)
def test_the_answer_does_not_rank(family: str, name: str) -> None:
    """With labels, the same tokens are kept and the same logits come out as where the answer was generated."""
    model, inputs = tiny(family, batch=2)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), pruner_of(name)(model) as run:
        whole, logits, rollout = answered(model, inputs, run)
        labels = labels_of(whole, length)
        trims = any(stage.trims_below for stage in run.pruner.stages(6))
        with pytest.warns(QuestionWarning, match="whole picture") if trims else nullcontext():
            forced = model(**whole, labels=labels, use_cache=False).logits[:, length - 1 : -1]
        assert kept(run) == rollout
        whole["input_ids"][:, length + 1 :] = 7  # another answer behind the same first token
        model(**whole, labels=labels, use_cache=False)
        assert kept(run) == rollout
    assert torch.allclose(forced, logits, atol=1e-4) == (not trims)


def test_without_a_word_the_whole_call_ranks() -> None:
    """So that what is said above is not true of itself."""
    model, inputs = tiny("llava", batch=2)
    with torch.no_grad(), pruner_of("fastv")(model) as run:
        whole, _, rollout = answered(model, inputs, run)
        model(**whole, use_cache=False)
        assert kept(run) != rollout


def test_labels_reach_a_loss_whose_gradient_is_that_of_the_generated_ranking() -> None:
    model, inputs = tiny("llava", batch=2)
    length = inputs["input_ids"].shape[1]
    with pruner_of("fastv")(model) as run:
        whole, _, rollout = answered(model, inputs, run)
        model.train()
        loss = model(**whole, labels=labels_of(whole, length), use_cache=False).loss
        loss.backward()
        assert kept(run) == rollout
    assert torch.isfinite(loss) and model.lm_head.weight.grad.abs().sum() > 0


def test_each_turn_of_a_labelled_conversation_ranks_its_own_pictures() -> None:
    model, inputs = tiny("llava", batch=1, images=2)
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    second = int((ids == model.config.image_token_id).nonzero()[16])
    turns = [torch.cat([ids[:second], ids[-3:]])[None], torch.cat([torch.tensor([5, 6]), ids[second:]])[None]]
    answer = torch.tensor([[11, 12, 13]])
    whole = torch.cat([turns[0], answer, turns[1], answer], 1)
    labels = torch.full_like(whole, -100)
    start = turns[0].shape[1]
    labels[:, start : start + 3], labels[:, -3:] = answer, answer
    for name in ("fastv", "himap", "sparsevlm", "pyramiddrop"):
        with torch.no_grad(), pruner_of(name)(model) as run:
            out = model(input_ids=turns[0], pixel_values=pixels[:1], use_cache=True)
            first = run.trace.kept().tolist()
            held = cache_argument(model, cache_of(out))
            for token in answer[0]:
                model(input_ids=token.view(1, 1), use_cache=True, **held)
            model(input_ids=turns[1], pixel_values=pixels[1:], use_cache=True, **held)
            later = run.trace.kept().tolist()
            model(input_ids=whole, pixel_values=pixels, labels=labels, use_cache=False)
            assert run.trace.kept().tolist() == first + [16 + k for k in later]


# -- what is read, and what the caller says ---------------------------------------------------------------------------
def test_the_first_logits_that_are_read_end_the_prompt_if_the_caller_says_so() -> None:
    model, inputs = tiny("llava", batch=2)
    with torch.no_grad(), pruner_of("fastv")(model, question="logits_to_keep") as run:
        whole, logits, rollout = answered(model, inputs, run)
        read = model(**whole, logits_to_keep=STEPS + 1, use_cache=False).logits
        assert kept(run) == rollout
        assert torch.allclose(read[:, :-1], logits, atol=1e-4)
        run.question = None  # how many logits are asked for changes nothing of its own accord
        model(**whole, logits_to_keep=STEPS + 1, use_cache=False)
        assert kept(run) != rollout


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "himap", "random"])
def test_the_caller_says_where_the_question_ends(name: str) -> None:
    model, inputs = tiny("llava", batch=2, side="left")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), pruner_of(name)(model) as run:
        whole, logits, rollout = answered(model, inputs, run)
    asks = torch.zeros_like(whole["input_ids"], dtype=torch.bool)
    asks[:, :length] = True
    seen = []

    def callback(ids: Any) -> int:
        seen.append(ids.shape)
        return length

    for question in (length, [length, length], torch.tensor([length] * 2), asks, callback):
        with torch.no_grad(), pruner_of(name)(model, question=question) as run:
            forced = model(**whole, use_cache=False).logits[:, length - 1 : -1]
            assert kept(run) == rollout
            assert torch.allclose(forced, logits, atol=1e-4)
    assert seen == [whole["input_ids"].shape]


def test_a_question_may_be_set_between_calls_and_serves_generate() -> None:
    model, inputs = tiny("llava", batch=1)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), pruner_of("fastv")(model) as run:
        whole, _, rollout = answered(model, inputs, run)
        run.question = length
        model(**whole, use_cache=False)
        assert kept(run) == rollout
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
        assert kept(run)[0] == rollout[0]
        with pytest.raises(ConfigError, match="question must be"):
            run.question = "what colour is it?"
        run.question = length + STEPS + 1
        with pytest.raises(LayoutError, match=f"1 to {length + STEPS} tokens"):
            model(**whole, use_cache=False)
        run.question = 3
        with pytest.raises(LayoutError, match="stands behind it"):
            model(**whole, use_cache=False)
        run.question = lambda ids: lambda: 3
        with pytest.raises(ConfigError, match="the function has to give"):
            model(**whole, use_cache=False)
        run.question = None
        model.generate(**inputs, max_new_tokens=2)
        assert kept(run) == rollout


# -- packed rows -----------------------------------------------------------------------------------------------------
def packed(lengths_of: str = "positions") -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """Four samples in one row: with a picture, without one, with two, and one that ends in its picture."""
    model, inputs = tiny("llava", batch=4, side="right", images=[1, 0, 2, 1])
    real = inputs["attention_mask"].bool()
    rows = [inputs["input_ids"][b][real[b]] for b in range(4)]
    visual = rows[3] == model.config.image_token_id
    rows[3] = torch.cat([rows[3][~visual], rows[3][visual]])
    pixels = inputs["pixel_values"]
    pictures = [pixels[:1], None, pixels[1:3], pixels[3:]]
    single = [
        {"input_ids": row[None], "use_cache": False, **({} if picture is None else {"pixel_values": picture})}
        for row, picture in zip(rows, pictures, strict=True)
    ]
    whole = {"input_ids": torch.cat(rows)[None], "pixel_values": pixels, "use_cache": False}
    whole["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return model, whole, single


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*METHODS, *OTHERS, "fastv-masked"])
def test_packed_samples_are_pruned_as_if_each_were_alone(name: str, attention: str) -> None:
    model, whole, single = packed()
    model.set_attn_implementation(attention)
    with torch.no_grad(), pruner_of(name)(model) as run:
        alone, expected, before = [], [], 0
        for sample in single:
            logits = model(**sample).logits[0]
            alone.append(logits)
            if "pixel_values" in sample:
                expected += [before + k for k in run.trace.kept().tolist()]
                before += len(run.trace.layout.rows[0])
        together = model(**whole).logits[0]
        assert run.trace.kept().tolist() == expected
        columns = run.trace.columns(5)
        assert int((columns >= 0).sum()) == run.trace.visual_tokens()[5]
    ends = torch.tensor([len(sample["input_ids"][0]) for sample in single]).cumsum(0) - 1
    for end, logits in zip(ends, alone, strict=True):
        assert torch.allclose(together[end], logits[-1], atol=2e-4)
    assert float(together[ends].abs().amin(1).max()) > 0


def test_packed_samples_with_labels_and_scopes() -> None:
    model, whole, single = packed()
    labels = torch.full_like(whole["input_ids"], -100)
    ends = torch.tensor([len(sample["input_ids"][0]) for sample in single]).cumsum(0)
    labels[0, ends[0] - 2 : ends[0]] = 9
    labels[0, ends[2] - 1] = 9
    with torch.no_grad(), pruner_of("fastv", scope="image", keep=4)(model) as run:
        expected, before = [], 0
        for sample, answer in zip(single, (2, 0, 1, 0), strict=True):
            if "pixel_values" not in sample:
                continue
            own = torch.full_like(sample["input_ids"], -100)
            if answer:
                own[0, -answer:] = 9
            model(**sample, labels=own)
            expected += [before + k for k in run.trace.kept().tolist()]
            before += len(run.trace.layout.rows[0])
        model(**whole, labels=labels)
        assert run.trace.kept().tolist() == expected
        assert len(expected) == 4 * 4


def test_packed_rows_are_known_by_the_lengths_that_flash_attention_gets() -> None:
    """And the kernel is told how long the samples are after the cut."""
    from transformers.modeling_utils import AttentionInterface

    heard: dict[int, Any] = {}

    def told_lengths(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        """Sees no mask, only lengths, as a kernel for packed rows does."""
        assert mask is None
        heard[module.layer_idx] = (kwargs["cu_seq_lens_q"].tolist(), kwargs["max_length_q"])
        edges = kwargs["cu_seq_lens_q"].long()
        number = torch.searchsorted(edges[1:].contiguous(), torch.arange(query.shape[2]), right=True)
        seen = (number[:, None] == number) & torch.ones(len(number), len(number)).bool().tril()
        repeat = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("told_lengths", told_lengths)
    model, whole, single = packed()
    lengths = torch.tensor([len(sample["input_ids"][0]) for sample in single])
    edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    told = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": int(lengths.max())}
    with torch.no_grad(), pruner_of("fastv")(model) as run:
        expected = model(**whole).logits[0, edges[1:].long() - 1]
        keep = kept(run)
    model.model.language_model.set_attn_implementation("told_lengths")
    with torch.no_grad(), pruner_of("fastv")(model) as run:
        found = model(**whole, **told).logits[0, edges[1:].long() - 1]
        assert kept(run) == keep
    assert torch.allclose(found, expected, atol=1e-4)
    assert heard[0] == (edges.tolist(), int(lengths.max()))
    told["max_length_q"] = lengths.max()  # some collators give it as a tensor
    with torch.no_grad(), pruner_of("fastv")(model):
        assert torch.equal(model(**whole, **told).logits[0, edges[1:].long() - 1], found)
    kept_of = [5, 0, 5, 5]
    short = [int(n) - 16 * p + k for n, p, k in zip(lengths, (1, 0, 2, 1), kept_of, strict=True)]
    assert heard[5] == ([0, *torch.tensor(short).cumsum(0).tolist()], max(short))


# -- prompts that end in the picture ----------------------------------------------------------------------------------
def ends_in_picture(batch: int = 1) -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny("llava", batch=batch, side="left")
    ids = inputs["input_ids"].clone()
    for row in ids:
        visual = row == model.config.image_token_id
        row[:] = torch.cat([row[~visual], row[visual]])
    return model, {**inputs, "input_ids": ids}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*METHODS, *OTHERS, "fastv-masked", "fastv-recompute"])
def test_the_token_whose_logits_are_read_always_stays(name: str, batch: int) -> None:
    model, inputs = ends_in_picture(batch)
    pruner = get(name)(keep=5) if name.startswith("fastv-") else pruner_of(name)
    with torch.no_grad(), pruner(model) as run:
        logits = model(**inputs).logits[:, -1]
        for b in range(batch):
            decision = run.trace.stages[-1].rows[b]
            assert 15 in decision.kept.tolist()
            assert len(decision.kept) == len(decision.kept.unique())
            assert decision.raw is None or decision.raw.shape == decision.candidates.shape
            last = run.trace.columns(5, b)[-1]
            assert int(last) == 15  # also where recycled tokens move
        tokens, steps = greedy(model, inputs)
        assert torch.allclose(steps[:, 0], logits, atol=1e-4)
        trace = run.trace
    assert float(logits.abs().sum()) > 0
    if name not in ("fastv-masked", "fastv-recompute"):
        oracle, _ = tiny("llava", batch=batch, side="left", attention="eager")
        with replayed(oracle, pruner, trace, inputs["attention_mask"], ends_in_picture=True):
            expected, _ = greedy(oracle, inputs, use_cache=False)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "sparsevlm"])
def test_the_last_token_is_part_of_the_budget(name: str) -> None:
    model, inputs = ends_in_picture()
    everyday, usual = tiny("llava")
    with torch.no_grad(), pruner_of(name)(model) as run:
        model(**inputs)
        counts = run.trace.visual_tokens()
    with torch.no_grad(), pruner_of(name)(everyday) as run:
        everyday(**usual)
        assert counts == run.trace.visual_tokens()


def test_keeping_everything_is_the_dense_model_there_too() -> None:
    model, inputs = ends_in_picture(2)
    with torch.no_grad():
        dense = model(**inputs).logits
        for name in METHODS:
            keep = pruner_of(name).keep
            with pruner_of(name, keep=tuple(99 for _ in keep) if isinstance(keep, tuple) else 99)(model):
                assert torch.equal(model(**inputs).logits, dense)


def test_a_single_visual_token_at_the_end() -> None:
    model, inputs = ends_in_picture()
    layout = eg.VisualLayout.from_spans([(inputs["input_ids"].shape[1] - 1, inputs["input_ids"].shape[1])], (1, 1))
    with torch.no_grad(), eg.FastV(keep=1, layer=2)(model, layout=layout) as run:
        model(**inputs)
        assert run.trace.kept().tolist() == [0]


def test_debiasing_and_scopes_where_the_prompt_ends_in_the_picture() -> None:
    model, inputs = tiny("llava", batch=1, images=2)
    ids = inputs["input_ids"].clone()
    visual = ids[0] == model.config.image_token_id
    ids[0] = torch.cat([ids[0][~visual], ids[0][visual]])
    for scope, name in (("image", "fastv"), ("frame", "sparsevlm"), ("image", "uniform")):
        pruner = pruner_of(name, scope=scope, debias="padding")
        with torch.no_grad(), pruner(model) as run:
            model(**{**inputs, "input_ids": ids})
            found = run.trace.kept()
            assert 31 in found.tolist()
            keep = pruner.keep[-1] if isinstance(pruner.keep, tuple) else pruner.keep
            assert int((found < 16).sum()) == int((found >= 16).sum()) == keep


# -- later turns -----------------------------------------------------------------------------------------------------
def turns(family: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A first turn, and the whole conversation with a made-up answer and a second question behind it."""
    model, inputs = tiny(family, batch=2)
    more = torch.tensor([[41, 42, 43, 99, 98, 97, 96]] * 2)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            whole[name] = torch.nn.functional.pad(inputs[name], (0, more.shape[1]), value=fill)
    return model, inputs, whole


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "himap", "tokencarve"])
def test_a_later_turn_ranks_anew_if_it_is_told_to(family: str, name: str) -> None:
    model, inputs, whole = turns(family)
    pruner = pruner_of(name)
    with torch.no_grad():
        with pruner(model) as run:
            fresh, expected = greedy(model, whole)
            anew = kept(run)
        for rerank in (False, True):
            cache = DynamicCache(config=model.config.get_text_config())
            with pruner(model, rerank=rerank) as run:
                greedy(model, inputs, 1, **cache_argument(model, cache))
                first = kept(run)
                given = whole if rerank else {k: v for k, v in whole.items() if k != "pixel_values"}
                tokens, logits = greedy(model, given, **cache_argument(model, cache))
                assert kept(run) == (anew if rerank else first)
                assert int(cache.get_seq_length()) == whole["input_ids"].shape[1] + 7
                if rerank:
                    assert torch.equal(tokens, fresh) and torch.allclose(logits, expected, atol=1e-5)
    assert first != anew or name != "fastv"


def test_going_on_with_an_answer_is_no_new_question() -> None:
    model, inputs = tiny("llava", batch=2)
    with torch.no_grad(), pruner_of("fastv")(model, rerank=True) as run:
        expected = model.generate(**inputs, max_new_tokens=6)
        cache = DynamicCache(config=model.config.get_text_config())
        out = model.generate(**inputs, max_new_tokens=3, **cache_argument(model, cache))
        count = len(run.traces)
        mask = torch.ones_like(out)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        more = {"input_ids": out, "attention_mask": mask}
        assert torch.equal(model.generate(**more, max_new_tokens=3, **cache_argument(model, cache)), expected)
        assert len(run.traces) == count


def test_a_refused_or_failed_turn_leaves_the_cache_as_it_was() -> None:
    model, inputs, whole = turns("llava")
    with torch.no_grad(), pruner_of("fastv")(model, rerank=True) as run:
        cache = DynamicCache(config=model.config.get_text_config())
        model.generate(**inputs, max_new_tokens=1, **cache_argument(model, cache))
        held, lengths = cache.get_seq_length(), [layer.keys.shape[2] for layer in cache.layers]
        blind = {k: v for k, v in whole.items() if k != "pixel_values"}
        with pytest.raises(ConfigError, match=r"rerank=True.*pixel_values"):
            model.generate(**blind, max_new_tokens=2, **cache_argument(model, cache))
        with pytest.raises(ValueError, match=r"(?i)image"):
            few = {**whole, "pixel_values": whole["pixel_values"][:1]}
            model.generate(**few, max_new_tokens=2, **cache_argument(model, cache))
        assert cache.get_seq_length() == held and [layer.keys.shape[2] for layer in cache.layers] == lengths
        tokens = model.generate(**whole, max_new_tokens=4, **cache_argument(model, cache))
        assert torch.equal(tokens, model.generate(**whole, max_new_tokens=4))
        assert len(run.traces) == 3


# -- mixtures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_rows_of_every_kind_in_one_batch(name: str) -> None:
    """Two packed rows of unlike division, one of them ending in a picture: each as it is alone."""
    _, _, single = packed()
    model, _ = tiny("llava", batch=1)
    ids = [sample["input_ids"][0] for sample in single]
    image = model.config.image_token_id
    rows = [torch.cat([ids[0], ids[2], ids[3]]), torch.cat([ids[2], ids[1], ids[0]])]
    length = max(map(len, rows))
    filler = [torch.arange(5, 5 + length - len(row)) for row in rows]  # further samples without pictures
    rows = [torch.cat([more, row]) for more, row in zip(filler, rows, strict=True)]
    order = [(0, 2, 3), (2, 1, 0)]
    positions = [
        torch.cat([torch.arange(len(more)), *(torch.arange(len(ids[k])) for k in numbers)])
        for more, numbers in zip(filler, order, strict=True)
    ]
    pictures = {k: single[k].get("pixel_values") for k in range(4)}
    pixels = torch.cat([pictures[k] for numbers in order for k in numbers if pictures[k] is not None])
    together = {
        "input_ids": torch.stack(rows),
        "position_ids": torch.stack(positions),
        "pixel_values": pixels,
        "use_cache": False,
    }
    assert int((together["input_ids"] == image).sum()) == 16 * len(pixels)
    with torch.no_grad(), pruner_of(name)(model) as run:
        logits = model(**together).logits
        found = kept(run)
        for b, numbers in enumerate(order):
            expected, before, end = [], 0, len(filler[b])
            for k in numbers:
                alone = model(**single[k]).logits[0, -1]
                end += len(ids[k])
                assert torch.allclose(logits[b, end - 1], alone, atol=2e-4)
                if pictures[k] is not None:
                    expected += [before + t for t in run.trace.kept().tolist()]
                    before += len(run.trace.layout.rows[0])
            assert found[b] == expected


@pytest.mark.parametrize("name", [*METHODS, "random"])
def test_a_batch_in_which_some_prompts_end_in_the_picture(name: str) -> None:
    model, inputs = tiny("llava", batch=3, side="left")
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
    visual = ids[1] == model.config.image_token_id
    ids[1] = torch.cat([ids[1][~visual], ids[1][visual]])
    batch = {**inputs, "input_ids": ids}
    with torch.no_grad(), pruner_of(name)(model) as run:
        tokens, logits = greedy(model, batch)
        together = kept(run)
        for b in range(3):
            real = mask[b].bool()
            one = {"input_ids": ids[b : b + 1, real], "pixel_values": inputs["pixel_values"][b : b + 1]}
            alone, steps = greedy(model, one)
            assert kept(run) == [together[b]]
            assert torch.equal(tokens[b], alone[0]) and torch.allclose(logits[b], steps[0], atol=1e-4)
    assert 15 in together[1]


def test_a_static_cache_ranks_anew_too() -> None:
    model, inputs, whole = turns("llava")
    with torch.no_grad(), pruner_of("fastv")(model, rerank=True) as run:
        fresh, _ = greedy(model, whole)
        anew = kept(run)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        greedy(model, inputs, 1, **cache_argument(model, cache))
        first = kept(run)
        tokens, _ = greedy(model, whole, **cache_argument(model, cache))
        assert kept(run) == anew != first
        assert torch.equal(tokens, fresh)


def test_packed_rows_can_be_trained_on() -> None:
    model, whole, single = packed()
    labels = whole["input_ids"].clone()
    labels[labels == model.config.image_token_id] = -100
    ends = torch.tensor([len(sample["input_ids"][0]) for sample in single]).cumsum(0)
    labels[0, : ends[0] - 2] = -100
    model.train()
    with pruner_of("fastv")(model) as run:
        loss = model(**whole, labels=labels).loss
        loss.backward()
    assert torch.isfinite(loss)
    assert sum(k < 16 for k in run.trace.kept().tolist()) == 5
