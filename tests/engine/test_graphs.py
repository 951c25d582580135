"""Graphs between stages: exact for other pictures and lengths, refused by name where they cannot be.

A CPU captures nothing: a stand-in runs the captured function again, on its own copies of the inputs.
"""

from __future__ import annotations

import copy
import re
import threading
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import evengaze as eg
from evengaze.compat import cache_of
from evengaze.engine import graphs
from evengaze.errors import ConfigError
from evengaze.methods import parse
from evengaze.testing import layout_of, tiny

METHODS = [
    "dense",
    "fastv:keep=5",
    "pyramiddrop:keep=[0.5,0.25],layers=[2,4]",
    "sparsevlm:keep=[6,3],layers=[1,3]",
    "himap:keep=[6,3],layers=[2,3]",
    "tokencarve:keep=5",
    "illava:keep=5,layer=2",
    "divprune:keep=5",
    "visionzip:keep=5",
]


class Replay:
    """Runs the function again in its own buffers, and poisons what an earlier call returned."""

    def __init__(self, function: Any, inputs: Any, pool: Any) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._function = function
        self.result = function(self._inputs)

    def __call__(self, inputs: Any) -> Any:
        for tensor in graphs.tensors(self.result):
            tensor.fill_(float("nan"))
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self.result = self._function(self._inputs)
        return self.result

    @staticmethod
    def pool() -> None:
        return None


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "recorder", lambda model: Replay)


def prefill(model: Any, inputs: Any) -> list[torch.Tensor]:
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return [out.logits, *(t for layer in cache_of(out).layers for t in (layer.keys, layer.values))]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", RuntimeError),
        ("operation not permitted when stream is capturing", ConfigError),
    ],
)
def test_why_nothing_is_captured(monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception]) -> None:
    """Exhausted memory is no property of the model: it stays the error that callers halve their batch for."""

    class Fails(Replay):
        def __init__(self, *_: Any) -> None:
            raise RuntimeError(said)

    monkeypatch.setattr(graphs, "recorder", lambda model: Fails)
    model, inputs = tiny("llava", 1)
    with torch.inference_mode(), parse("fastv:keep=5")(model, graphs=True):
        prefill(model, inputs)
        with pytest.raises(kind, match=re.escape(said)) as error:
            prefill(model, inputs)
    assert type(error.value) is kind


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_replayed_prefills_are_the_engines_bit_for_bit(method: str, batch: int, family: str) -> None:
    if family == "llama" and method.startswith("visionzip"):
        pytest.skip("no tower")
    model, first = tiny(family, batch)
    _, second = tiny(family, batch, seed=5)
    layout = layout_of(first) if family == "llama" else None
    with torch.inference_mode():
        with parse(method)(model, layout=layout):
            expected = [prefill(model, first), prefill(model, second)]
        with parse(method)(model, layout=layout, graphs=True) as run:
            found = [prefill(model, x) for x in (first, first, first, second, first)]
            counts = run.graphs.counts
        again = prefill(model, first)
    for got, number in zip(found, (0, 0, 0, 1, 0), strict=True):
        assert len(got) == len(expected[number])
        assert all(torch.equal(a, b) for a, b in zip(got, expected[number], strict=True))
    assert counts["captured"] > 0 and counts["captured"] + counts["replayed"] >= 4 * counts["first sight"] - 1
    model_again, _ = tiny(family, batch)
    with torch.inference_mode():
        assert torch.equal(again[0], prefill(model_again, first)[0])  # nothing is left behind


@pytest.mark.parametrize("method", ["fastv:keep=5", "pyramiddrop:keep=[0.5,0.25],layers=[2,4]", "tokencarve:keep=5"])
def test_generations_and_second_turns(method: str) -> None:
    model, inputs = tiny("llava", 2)
    options = {"max_new_tokens": 5, "do_sample": False}
    with parse(method)(model):
        expected = model.generate(**inputs, **options)
    with parse(method)(model, graphs=True) as run:
        for _ in range(3):
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert run.graphs.counts["replayed"]
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        longer = torch.cat([out.sequences, torch.full((2, 3), 9)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
        replayed = run.graphs.counts["replayed"]
        turn = {"input_ids": longer, "attention_mask": mask, **options}
        second = model.generate(**turn, past_key_values=cache_of(out)) if _named("past_key_values", model) else None
        assert run.graphs.counts["replayed"] == replayed  # further turns run as ever
    if second is not None:
        with parse(method)(model):
            out = model.generate(**inputs, **options, return_dict_in_generate=True)
            assert torch.equal(model.generate(**turn, past_key_values=cache_of(out)), second)


def _named(name: str, model: Any) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def test_what_graphs_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model, graphs=True), pytest.raises(ConfigError, match="gradients"):
        model(**inputs)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="CUDA"):
        eg.FastV(keep=5)(model, graphs=True)
    with torch.inference_mode():
        model(**tiny("llava")[1])  # nothing stays attached


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "aya_vision", "internvl", "qwen2_5_vl", "paligemma"])
def test_segments_end_where_the_model_does_something_between_layers(family: str) -> None:
    """Windows that alternate, pictures added behind early layers; also under other methods with the same graphs."""
    shared = eg.Graphs()
    for batch in (1, 2):
        model, first = tiny(family, batch)
        _, second = tiny(family, batch, seed=5)
        shared = eg.Graphs()
        layer = 4 if family == "gemma3" else 3
        with torch.inference_mode():
            for pruner in (eg.FastV(keep=5, layer=layer), eg.Dense(), eg.FastV(keep=4, layer=layer)):
                with pruner(model):
                    expected = [prefill(model, inputs) for inputs in (first, second)]
                with pruner(model, graphs=shared):
                    found = [prefill(model, inputs) for inputs in (first, first, first, first, second)]
                for got, number in zip(found, (0, 0, 0, 0, 1), strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(got, expected[number], strict=True))
        assert shared.counts["replayed"] and bool(shared.cuts) == (family in ("gemma3", "qwen3_vl", "aya_vision"))


def test_what_a_model_begins_to_do_between_layers_is_noticed() -> None:
    model, inputs = tiny("llava")
    layers = model.model.language_model.layers
    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True) as run:
        for _ in range(2):
            prefill(model, inputs)
        plain = type(layers[4]).__call__

        def shifted(self: Any, hidden: torch.Tensor, **given: Any) -> Any:
            return plain(self, hidden + (1.0 if self is layers[4] else 0.0), **given)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="between its layers"):
            patch.setattr(type(layers[4]), "__call__", shifted)
            prefill(model, inputs)
        assert run.graphs.counts["captured"]


def test_what_changes_states_in_place_between_layers_ends_a_segment() -> None:
    model, inputs = tiny("llava")
    layers = model.model.language_model.layers
    plain = type(layers[4]).__call__

    def shifted(self: Any, hidden: torch.Tensor, **given: Any) -> Any:
        return plain(self, hidden.add_(1.0) if self is layers[4] else hidden, **given)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(type(layers[4]), "__call__", shifted)
        with eg.FastV(keep=5)(model):
            expected = prefill(model, inputs)
        with eg.FastV(keep=5)(model, graphs=True) as run:
            for _ in range(5):
                assert torch.equal(prefill(model, inputs)[0], expected[0])
            assert run.graphs.cuts == {4}


def test_the_number_of_graphs_is_bounded() -> None:
    model, _ = tiny("llama")
    with torch.inference_mode():
        for length in range(3):
            _, inputs = tiny("llama", seed=length)
            ids = torch.cat([inputs["input_ids"], torch.full((1, length), 7)], 1)
            with eg.FastV(keep=5)(model, layout=layout_of(inputs), graphs=eg.Graphs(shapes=3)) as run:
                for extra in range(4):
                    longer = torch.cat([ids, torch.full((1, extra), 9)], 1)
                    for _ in range(2):
                        model(input_ids=longer)
                assert len(run.graphs) <= 3


def test_graphs_outlive_an_attachment_and_serve_several_methods() -> None:
    model, inputs = tiny("llava")
    shared = eg.Graphs()
    assert replaced_forwards(model) == []
    with torch.inference_mode():
        for method in ("fastv:keep=5", "dense", "fastv:keep=4", "pyramiddrop:keep=[0.5,0.25],layers=[2,4]") * 3:
            with parse(method)(model):
                expected = prefill(model, inputs)
            with parse(method)(model, graphs=shared) as run:
                found = prefill(model, inputs)
                assert run.graphs is shared
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert shared.counts["captured"] == len(shared) and shared.counts["replayed"] >= len(shared)
        assert "dropped: the model changed" not in shared.counts
    assert len(shared) and shared.nbytes > 0 and str(len(shared)) in repr(shared)
    other, _ = tiny("llava", seed=1)
    with pytest.raises(ConfigError, match="another model"):
        eg.FastV(keep=5)(other, graphs=shared)
    shared.clear()
    assert shared.nbytes == len(shared) == 0
    assert replaced_forwards(model) == []


def replaced_forwards(model: Any) -> list[Any]:
    return [module for module in model.modules() if "forward" in module.__dict__]


def test_own_graphs_end_with_their_attachment_and_copies_of_the_model_have_none() -> None:
    model, inputs = tiny("llava")
    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True) as run:
        for _ in range(2):
            out = prefill(model, inputs)
        assert len(run.graphs)
        twin = copy.deepcopy(model)
    assert not len(run.graphs)
    assert all("evengaze" not in type(m.__dict__["forward"]).__module__ for m in replaced_forwards(twin))
    with torch.inference_mode():
        assert torch.equal(prefill(twin, inputs)[0], prefill(model, inputs)[0])
        assert not torch.equal(out[0], prefill(model, inputs)[0])


def moved(model: Any) -> None:
    for part in model.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(weight * 1.01)


def replaced(model: Any) -> None:
    part = next(m for m in model.modules() if hasattr(m, "down_proj"))
    part.down_proj = torch.nn.Linear(part.down_proj.in_features, part.down_proj.out_features, bias=False)


def reloaded(model: Any) -> None:
    model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}, assign=True)


def doubled(model: Any) -> None:
    model.double()


@pytest.mark.parametrize("change", [moved, replaced, reloaded, doubled])
def test_weights_that_lie_elsewhere_drop_the_graphs(change: Any) -> None:
    model, inputs = tiny("llava")
    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True) as run:
        for _ in range(3):
            before = prefill(model, inputs)
        change(model)
        if change is doubled:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        found = [prefill(model, inputs) for _ in range(3)]
        assert run.graphs.counts["dropped: the model changed"] > 0
    with torch.inference_mode(), eg.FastV(keep=5)(model):
        expected = prefill(model, inputs)
    assert not torch.equal(before[0], expected[0])
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("generates", [False, True])
def test_weights_are_looked_at_once_a_call_and_again_in_the_next(generates: bool, monkeypatch: Any) -> None:
    """The layers' in the tower's turn, if it has one: the device is busy then. A call that failed there counts not."""
    model, inputs = tiny("llava")
    looked, look = list[Any](), graphs._Weights._look
    monkeypatch.setattr(graphs._Weights, "_look", lambda self: looked.append(self) or look(self))

    def call() -> None:
        model.generate(**inputs, max_new_tokens=2) if generates else model(**inputs)

    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True) as run:
        for _ in range(3):
            call()
        looked.clear()
        call()
        assert len(looked) == 2 and looked[0] is not looked[1]
        hook = model.model.multi_modal_projector.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call()
        hook.remove()
        moved(model)
        expected = [prefill(model, inputs) for _ in range(3)]
        assert run.graphs.counts["dropped: the model changed"] > 0
    with torch.inference_mode(), eg.FastV(keep=5)(model):
        plain = prefill(model, inputs)
    assert all(torch.equal(a, b) for got in expected for a, b in zip(got, plain, strict=True))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # read by peft
def test_adapters_that_are_switched_off_are_off() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny("llava")
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.eval()
    with torch.inference_mode(), eg.FastV(keep=5)(lora):
        expected = prefill(lora, inputs)
        with lora.disable_adapter():
            bare = prefill(lora, inputs)
    with torch.inference_mode(), eg.FastV(keep=5)(lora, graphs=True) as run:
        found = [prefill(lora, inputs) for _ in range(3)]
        with lora.disable_adapter():
            without = [prefill(lora, inputs) for _ in range(3)]
        lora.merge_adapter()
        merged = [prefill(lora, inputs) for _ in range(3)]
        assert run.graphs.counts["captured"] >= 6
    assert all(torch.equal(x[0], expected[0]) for x in found) and all(torch.equal(x[0], bare[0]) for x in without)
    assert all(torch.allclose(x[0], expected[0], atol=1e-4) for x in merged) and not torch.equal(bare[0], expected[0])


def test_what_happens_between_layers_is_not_lost() -> None:
    """Hooks, outputs that are collected, autocast: refused; a hook is noticed when it comes."""
    model, inputs = tiny("llava")
    part = next(m for m in model.modules() if hasattr(m, "down_proj"))
    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True):
        for _ in range(2):
            prefill(model, inputs)
        for asked in ("output_hidden_states", "output_attentions"):
            with pytest.raises(ConfigError, match=asked):
                model(**inputs, **{asked: True})
        for module in (part, part.down_proj, model.model.language_model.layers[1]):
            heard = module.register_forward_hook(lambda *given: None)
            with pytest.raises(ConfigError, match="hooks"):
                prefill(model, inputs)
            heard.remove()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
            prefill(model, inputs)
        prefill(model, inputs)


@pytest.mark.parametrize("method", ["fastv:keep=5", "sparsevlm:keep=[6,3],layers=[1,3]", "tokencarve:keep=5"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_static_caches(method: str, family: str) -> None:
    for batch in (1, 2):
        model, inputs = tiny(family, batch)
        options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
        with parse(method)(model):
            expected = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        with parse(method)(model, graphs=True) as run:
            for _ in range(3):
                found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
                assert torch.equal(found.sequences, expected.sequences)
                assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
            assert run.graphs.counts["replayed"]


@pytest.mark.slow
def test_steps_are_compiled_as_without_graphs() -> None:
    """One attachment a request: layers whose forward is replaced are not compiled anew."""
    model, _ = tiny("llava")
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for number in range(6):
        _, inputs = tiny("llava", seed=number)
        options = {"max_new_tokens": 4 + number % 2, "do_sample": False}
        with torch.no_grad(), eg.PyramidDrop(keep=(0.5, 0.25), layers=(2, 4))(model, graphs=True):
            expected = model.generate(**inputs, **options)
            found = model.generate(**inputs, **options, cache_implementation="static", compile_config=config)
        assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_threads_share_graphs_without_disturbing_each_other() -> None:
    model, _ = tiny("llava")
    given = [tiny("llava", seed=seed)[1] for seed in range(4)]
    pruner = eg.PyramidDrop(keep=(0.5, 0.25), layers=(2, 4))
    with pruner(model), torch.inference_mode():
        expected = [prefill(model, inputs) for inputs in given]
    wrong: list[int] = []

    def ask(number: int) -> None:
        with torch.inference_mode():
            for _ in range(12):
                found = prefill(model, given[number])
                if not all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True)):
                    wrong.append(number)

    with pruner(model, graphs=True) as run:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert run.graphs.counts["replayed"]
    assert not wrong


def test_a_call_that_fails_leaves_the_graphs_to_the_next() -> None:
    model, inputs = tiny("llava")
    layer = model.model.language_model.layers[3]
    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True) as run:
        for _ in range(2):
            expected = prefill(model, inputs)
        plain, layer.mlp.forward = layer.mlp.forward, None
        with pytest.raises(TypeError):
            prefill(model, inputs)
        del layer.mlp.forward
        assert plain is not None
        replayed = run.graphs.counts["replayed"]
        assert torch.equal(prefill(model, inputs)[0], expected[0])
        assert run.graphs.counts["replayed"] > replayed


def test_memory_is_bounded() -> None:
    model, inputs = tiny("llava")
    with torch.inference_mode():
        with eg.FastV(keep=5)(model, graphs=True) as run:
            for _ in range(2):
                prefill(model, inputs)
            whole, count = run.graphs.nbytes, len(run.graphs)
        with eg.FastV(keep=5)(model, graphs=eg.Graphs(memory=whole // 2)) as run:
            for _ in range(4):
                prefill(model, inputs)
            assert run.graphs.nbytes <= whole // 2 or len(run.graphs) == 1
            assert len(run.graphs) < count
    for wrong in ({"memory": 0}, {"shapes": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            eg.Graphs(**wrong)


def test_what_a_tower_gave_stays_as_it_was() -> None:
    model, first = tiny("llava")
    _, second = tiny("llava", seed=5)
    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True) as run:
        for _ in range(2):
            model.get_image_features(first["pixel_values"])
        held = model.get_image_features(first["pixel_values"])
        kept = [t.clone() for t in graphs.tensors(dict(held))]
        model.get_image_features(second["pixel_values"])
        assert run.graphs.counts["replayed"]
        assert all(torch.equal(a, b) for a, b in zip(graphs.tensors(dict(held)), kept, strict=True))


def test_a_tower_that_finds_the_graphs_in_use_says_so() -> None:
    model, inputs = tiny("llava")

    class Call:
        pass

    with torch.inference_mode(), eg.FastV(keep=5)(model, graphs=True) as run:
        for _ in range(2):
            model.get_image_features(inputs["pixel_values"])
        other, before = Call(), run.graphs.counts.copy()
        assert run.graphs.take(other)
        model.get_image_features(inputs["pixel_values"])
        assert run.graphs.counts - before == {"graphs in use by another call": 1}
        run.graphs.leave(other)
        model.get_image_features(inputs["pixel_values"])
        assert run.graphs.counts["replayed"] == before["replayed"] + 1
