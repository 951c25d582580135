"""Every method in both modes, with and without debiasing, alone and in a padded batch.

The prompts are those of a bare decoder whose layout says that each row's picture was padded in another way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from evengaze import methods
from evengaze.compat import cache_of
from evengaze.debias import Debias, Exponential, PaddingMask
from evengaze.errors import ConfigError, UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.memory import Shared
from evengaze.methods.base import Pruner, attach
from evengaze.methods.fastv import FastV
from evengaze.methods.illava import ILLaVA
from evengaze.methods.official import FastVMasked, FastVRecompute, HiMAPRecompute
from evengaze.methods.sparsevlm import Raters, SparseVLM
from evengaze.methods.visionzip import VisionZip
from evengaze.models import adapter_for
from evengaze.protocol import View
from evengaze.schedule import Schedule
from evengaze.testing import layout_of, tiny
from evengaze.testing.oracle import replayed
from evengaze.trace import Trace

STEPS, GRID, VISUAL, LAYERS = 8, (4, 4), 16, 6
SIZES = ((40, 20), (20, 40), (30, 30))

METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 5, "layer": 2},
    "pyramiddrop": {"keep": (0.5, 0.25), "layers": (2, 4)},
    "sparsevlm": {"keep": (6, 3), "layers": (1, 3)},
    "himap": {"keep": (6, 3), "layers": (2, 4)},
    "tokencarve": {"keep": 5, "layer": 2},
    "illava": {"keep": 5, "layer": 2},
    "divprune": {"keep": 5},
    "tome": {"keep": 5},
    "random": {"keep": 5},
    "uniform": {"keep": 5},
    "pool": {"keep": 5},
}
DEBIAS = {
    "plain": None,
    "padding": Debias(PaddingMask()),
    "trend": Debias(trend=Exponential(1.5)),
    "both": Debias(PaddingMask(), Exponential(1.5)),
}
BLIND = ("divprune", "tome", "random", "uniform", "pool")


@dataclass
class Run:
    tokens: Tensor
    logits: Tensor
    trace: Trace | None
    lengths: list[int]


def prompt(batch: int, attention: str) -> tuple[Any, dict[str, Tensor], VisualLayout]:
    model, inputs = tiny("llama", batch, attention)
    spans = [(int(r.position[0]), int(r.position[-1]) + 1) for r in layout_of(inputs, GRID).rows]
    return model, inputs, VisualLayout.from_spans(spans, GRID, image_sizes=SIZES[:batch])


def alone(inputs: dict[str, Tensor], layout: VisualLayout, row: int) -> tuple[dict[str, Tensor], VisualLayout]:
    real = inputs["attention_mask"][row].bool()
    start = int(layout.rows[row].position[0]) - int((~real).sum())
    one = {"input_ids": inputs["input_ids"][row][real][None]}
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    return one, VisualLayout.from_spans([(start, start + VISUAL)], GRID, image_sizes=[SIZES[row]])


def generate(
    model: Any, inputs: dict[str, Tensor], pruner: Pruner | None, layout: VisualLayout | None = None, **options: Any
) -> Run:
    handle = None if pruner is None else pruner(model, layout=layout)
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    finally:
        if handle is not None:
            handle.remove()
    cache = cache_of(out)
    lengths = [] if cache is None else [layer.keys.shape[-2] for layer in cache.layers]
    return Run(out.sequences[:, -STEPS:], torch.stack(out.logits, 1), handle and handle.trace, lengths)


def make(name: str, mode: str, debias: str) -> Pruner:
    return methods.get(name)(**METHODS[name], mode=mode, debias=DEBIAS[debias])  # type: ignore[arg-type]


def trims(pruner: Pruner) -> bool:
    return any(stage.trims_below for stage in pruner.stages(LAYERS))


CELLS = [
    (name, mode, debias)
    for name in METHODS
    for mode in ("corrected", "official")
    for debias in DEBIAS
    if name not in BLIND or (mode, debias) in (("corrected", "plain"), ("corrected", "both"))
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "mode", "debias"), CELLS)
def test_batch_equals_single_and_both_equal_the_slow_oracle(name: str, mode: str, debias: str, attention: str) -> None:
    pruner = make(name, mode, debias)
    model, inputs, layout = prompt(3, attention)
    batch = generate(model, inputs, pruner, layout)
    assert batch.trace is not None
    scale = float(batch.logits.abs().max())
    for row in range(3):
        one, where = alone(inputs, layout, row)
        single = generate(model, one, pruner, where)
        assert single.trace is not None
        for i in range(len(single.trace.stages)):
            assert torch.equal(single.trace.kept(0, i), batch.trace.kept(row, i))
        assert torch.equal(single.tokens[0], batch.tokens[row])
        assert float((single.logits[0] - batch.logits[row]).abs().max()) < 2e-4 * scale
        # Caches hold what the trace says went on, and what the schedule predicts where no padding was left out.
        text = one["input_ids"].shape[1] - VISUAL
        entered = single.trace.visual_tokens(0)
        held = [entered[-1]] * LAYERS if trims(pruner) else entered
        assert single.lengths == [n + text + STEPS - 1 for n in held]
        if debias in ("plain", "trend") or mode == "official" or name in BLIND:
            schedule = Schedule.of(pruner, LAYERS, VISUAL)
            assert (list(schedule.entering), list(schedule.cached)) == (entered, held)
    slow, _, _ = prompt(3, "eager")
    with replayed(slow, pruner, batch.trace, inputs["attention_mask"]):
        expected = generate(slow, inputs, None, use_cache=False)
    assert torch.equal(batch.tokens, expected.tokens)
    assert float((batch.logits - expected.logits).abs().max()) < 2e-4 * scale


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("debias", DEBIAS)
@pytest.mark.parametrize("name", METHODS)
def test_keeping_all_is_the_dense_model_bit_for_bit(name: str, debias: str, attention: str) -> None:
    model, inputs, layout = prompt(3, attention)
    keep = METHODS[name]["keep"]
    pruner = make(name, "corrected", debias).replace(keep=tuple(99 for _ in keep) if isinstance(keep, tuple) else 99)
    assert torch.equal(generate(model, inputs, pruner, layout).logits, generate(model, inputs, None).logits)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "himap", "tokencarve", "illava"])
def test_without_a_cache_the_selection_is_repeated(name: str) -> None:
    model, inputs, layout = prompt(3, "sdpa")
    pruner = make(name, "corrected", "both")
    if trims(pruner):
        pytest.skip("what was cut from the caches below cannot be cut without caches")
    cached = generate(model, inputs, pruner, layout)
    repeated = generate(model, inputs, pruner, layout, use_cache=False)
    assert torch.equal(cached.tokens, repeated.tokens)
    assert torch.allclose(cached.logits, repeated.logits, atol=2e-4 * float(cached.logits.abs().max()))


# -- official variants ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_fastv_removes_nothing_and_batches(attention: str) -> None:
    model, inputs, layout = prompt(3, attention)
    pruner = FastVMasked(5)
    batch = generate(model, inputs, pruner, layout)
    assert len(set(batch.lengths)) == 1
    dense = generate(model, inputs, None)
    assert not torch.allclose(batch.logits, dense.logits, atol=1e-2)
    for row in range(3):
        one, where = alone(inputs, layout, row)
        single = generate(model, one, pruner, where)
        assert torch.equal(single.tokens[0], batch.tokens[row])
        # The first token is chosen before any step ranks again, so removal gives the same.
        removed = generate(model, one, FastV(5, mode="official"), where)
        assert torch.allclose(single.logits[0, 0], removed.logits[0, 0], atol=1e-4)
    assert torch.equal(generate(model, inputs, None).logits, dense.logits)


@pytest.mark.parametrize("pruner", [FastVRecompute(5), HiMAPRecompute((6, 3), (2, 4))], ids=lambda p: p.name)
def test_recomputing_methods_rank_every_call(pruner: Pruner) -> None:
    model, inputs, layout = prompt(1, "sdpa")
    ids = inputs["input_ids"]
    drifting = generate(model, {"input_ids": ids}, pruner, layout, use_cache=False).logits
    longer = torch.cat([ids, drifting[:, :3].argmax(-1)], 1)
    with torch.no_grad(), pruner(model, layout=layout):
        fresh = model(input_ids=longer, use_cache=False).logits[:, -1]
    assert torch.allclose(drifting[:, 3], fresh, atol=1e-4)


def test_attach_does_what_the_pruner_does() -> None:
    model, inputs, layout = prompt(1, "sdpa")
    pruner, ids = FastVRecompute(5), inputs["input_ids"]
    drifting = generate(model, {"input_ids": ids}, pruner, layout, use_cache=False).logits
    with attach(model, pruner, layout=layout):
        assert torch.equal(generate(model, {"input_ids": ids}, None, use_cache=False).logits, drifting)
    frozen = generate(model, {"input_ids": ids}, FastV(5, mode="official"), layout, use_cache=False).logits
    assert not torch.allclose(drifting, frozen, atol=1e-4)


# -- the vision tower -------------------------------------------------------------------------------------------------
TOWER: list[Pruner] = [
    VisionZip(5),
    ILLaVA(0.5, 2, vision_layers=(0, 1), vision_drop=3),
    ILLaVA(1.0, 2, vision_layers=(1,), vision_drop=0.5),
]


@pytest.mark.parametrize("pruner", TOWER, ids=methods.spec)
@pytest.mark.parametrize("images", [1, 2])
def test_tower_methods_batch_and_match_the_schedule(pruner: Pruner, images: int) -> None:
    model, inputs = tiny("llava", 3, images=images)
    before = generate(model, inputs, None).logits
    batch = generate(model, inputs, pruner)
    assert batch.trace is not None
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        one = {"input_ids": inputs["input_ids"][row][real][None]}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        one["pixel_values"] = inputs["pixel_values"][row * images : (row + 1) * images]
        single = generate(model, one, pruner)
        assert single.trace is not None
        assert torch.equal(single.trace.kept(0), batch.trace.kept(row))
        assert torch.equal(single.tokens[0], batch.tokens[row])
        if images == 1:
            schedule = Schedule.of(pruner, LAYERS, VISUAL)
            assert single.trace.visual_tokens(0) == list(schedule.entering)
    beams = generate(model, inputs, pruner, num_beams=2)
    assert beams.trace is not None
    assert torch.equal(beams.trace.kept(2), batch.trace.kept(1))
    assert torch.equal(generate(model, inputs, None).logits, before)


@pytest.mark.parametrize("pruner", TOWER, ids=methods.spec)
def test_the_decoder_stage_of_tower_methods_is_the_oracles(pruner: Pruner) -> None:
    model, inputs = tiny("llava", 2)
    pruned = generate(model, inputs, pruner)
    assert pruned.trace is not None
    slow, _ = tiny("llava", 2, "eager")
    undo = pruner.prepare(slow, adapter_for(slow), Shared())  # the same tower; the decoder removes nothing
    with replayed(slow, pruner, pruned.trace, inputs["attention_mask"]):
        expected = generate(slow, inputs, None, use_cache=False)
    undo()
    assert torch.equal(pruned.tokens, expected.tokens)


def test_a_shortened_clip_tower_is_what_it_computes_by_hand() -> None:
    model, inputs = tiny("llava", 2, "eager")
    pruner, pixels = ILLaVA(vision_layers=(0, 1), vision_drop=3), inputs["pixel_values"]
    adapter = adapter_for(model)
    tower = adapter.vision_tower(model)
    undo = pruner.prepare(model, adapter, Shared())
    with torch.no_grad():
        out = tower.module(pixels, output_hidden_states=True).hidden_states[tower.output]
    undo()

    clip = getattr(tower.module, "vision_model", tower.module)
    with torch.no_grad():
        for b in range(2):
            states = clip.pre_layrnorm(clip.embeddings(pixels[b : b + 1]))
            kept = torch.arange(states.shape[1] - 1)
            for layer in tower.layers[: tower.output]:
                mixed, weights = layer.self_attn(layer.layer_norm1(states), attention_mask=None)
                states = states + mixed
                order = weights.mean((0, 1, 2))[1:].argsort(descending=True)
                target, rest = order[-4], order[-3:]
                group = torch.cat([target[None], rest]) + 1
                share = torch.arange(1.0, 5.0)[:, None] / 10
                states[0, target + 1] = (states[0, group] * share).sum(0)
                left = order[:-3].sort().values
                states, kept = states[:, torch.cat([torch.zeros(1).long(), left + 1])], kept[left]
                states = states + layer.mlp(layer.layer_norm2(states))
            assert torch.allclose(out[b, kept + 1], states[0, 1:], atol=1e-5)
            assert len(kept) == 10 and int((out[b, 1:] == 0).all(-1).sum()) == 6


def test_a_tower_whose_survivors_keep_everything_is_dense() -> None:
    model, inputs = tiny("llava", 2)
    dense = generate(model, inputs, None).logits
    assert torch.equal(generate(model, inputs, VisionZip(99)).logits, dense)


def test_tower_methods_need_the_whole_model() -> None:
    model, _, layout = prompt(1, "sdpa")
    with pytest.raises(UnsupportedModelError, match="whole vision-language model"):
        VisionZip(5)(model, layout=layout)
    llava, _ = tiny("llava")
    with pytest.raises(ConfigError, match="shape the features"):
        ILLaVA(vision_layers=(2,), vision_drop=3)(llava)
    qwen, _ = tiny("qwen2_vl")
    with pytest.raises(UnsupportedModelError, match="merge"):
        VisionZip(5)(qwen)


def test_sparsevlm_asks_the_same_raters_after_a_row_of_patches_is_gone() -> None:
    """Breaks between rows of patches are text; behind the last patch that is left they come before the question."""
    model, inputs = tiny("mistral3", num_hidden_layers=6)
    texts, asked = [], []

    class Watched(SparseVLM):
        def score(self, view: View) -> Tensor:
            (text,), raters = view.text.real, view.memory.get(Raters)
            texts.append(int(text.sum()))
            asked.append((view.hidden.shape[1] - raters.among(view.text).index[raters.chosen]).tolist())
            return super().score(view)

    with torch.no_grad(), Watched((4, 3, 2), (1, 2, 3))(model):
        model(**inputs)
    assert texts[0] < texts[1] <= texts[2]
    assert asked[0] == asked[1] == asked[2]
