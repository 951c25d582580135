"""What is compiled by torch is pruned right or refused by name, whoever was first; never dense without a word."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn
from transformers import CompileConfig

import evengaze as eg
from evengaze.compat import cache_of
from evengaze.errors import AttachError, NothingPrunedError
from evengaze.methods import parse
from evengaze.testing import tiny
from interrupts import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*run uncompiled"),
    pytest.mark.skipif(
        not hasattr(torch.compiler, "is_exporting"), reason="this transformers cannot be compiled by it"
    ),
]
REFUSED = (AttachError, NothingPrunedError)
COMPILE = {"backend": "eager"}


def decoder(model):
    return model.model.language_model


def compile_model(model):
    model.compile(**COMPILE)


def compile_whole(model):
    model.compile(**COMPILE, fullgraph=True)


def compile_forward(model):
    model.forward = torch.compile(model.forward, **COMPILE)


def wrap_model(model):
    return torch.compile(model, **COMPILE)


def compile_base(model):
    model.model.compile(**COMPILE)


def compile_decoder(model):
    decoder(model).compile(**COMPILE)


def wrap_decoder(model):
    model.model.language_model = torch.compile(decoder(model), **COMPILE)


def compile_layers(model):
    for layer in decoder(model).layers:
        layer.compile(**COMPILE)


def wrap_layers(model):
    layers = decoder(model).layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, **COMPILE)


def compile_layers_forward(model):
    for layer in decoder(model).layers:
        layer.forward = torch.compile(layer.forward, **COMPILE)


def compile_attention(model):
    for layer in decoder(model).layers:
        layer.self_attn.compile(**COMPILE)


def compile_tower(model):
    model.model.vision_tower.compile(**COMPILE)


def compile_feed_forward(model):
    for layer in decoder(model).layers:
        layer.mlp.compile(**COMPILE)
    model.lm_head.compile(**COMPILE)


PRUNED, NO = "pruned", "refused"
# how: (attached after it was compiled, attached before)
CASES = {
    compile_model: (PRUNED, NO),
    compile_whole: (PRUNED, NO),
    compile_forward: (PRUNED, NO),
    wrap_model: (PRUNED, NO),
    compile_base: (PRUNED, NO),
    compile_decoder: (PRUNED, NO),
    wrap_decoder: (PRUNED, NO),
    compile_layers: (PRUNED, NO),
    wrap_layers: (PRUNED, NO),
    compile_layers_forward: (PRUNED, NO),
    compile_attention: (PRUNED, NO),
    compile_tower: (PRUNED, PRUNED),
    compile_feed_forward: (PRUNED, PRUNED),
}
METHODS = ["fastv:keep=2", "pyramiddrop:layers=[2,4],keep=[8,4]"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def short(model, inputs):
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits), cache_of(out).layers[-1].keys.shape[-2]


def both(model, inputs):
    """Logits of a forward call and of a generation, and the entries of the last cache layer."""
    with torch.no_grad():
        return model(**inputs).logits, *short(model, inputs)


def expected(method):
    model, inputs = tiny("llava", batch=2)
    with parse(method)(model):
        return both(model, inputs)


def compiled_by(how, model):
    wrapped = how(model)
    return model if wrapped is None else wrapped


def same(found, wanted):
    """The same sequence, to the rounding of compiled code."""
    return found[2] == wanted[2] and all((a - b).abs().max() < 1e-4 for a, b in zip(found[:2], wanted[:2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", ["compiled", "attached"])
@pytest.mark.parametrize("how", CASES, ids=lambda how: how.__name__)
def test_table(how, first, method):
    model, inputs = tiny("llava", batch=2)
    both(model, inputs)  # transformers installs its own hooks in the first call
    if first == "compiled":
        wrapped = compiled_by(how, model)
        before = snapshot(model)
        handle = parse(method)(wrapped)
    else:
        handle = parse(method)(model)
        wrapped = compiled_by(how, model)
    if CASES[how][first == "attached"] == PRUNED:
        assert same(both(wrapped, inputs), expected(method))
    else:
        with pytest.raises((*REFUSED, torch._dynamo.exc.Unsupported), match=r"compil"), torch.no_grad():
            wrapped(**inputs)
        if how is not wrap_model:  # the wrapper's generate() is the model's, which is not compiled
            with pytest.raises((*REFUSED, torch._dynamo.exc.Unsupported), match=r"compil"):
                short(wrapped, inputs)
    handle.remove()
    if first == "compiled":
        assert snapshot(model) == before


@pytest.mark.parametrize("how", [compile_model, compile_layers], ids=lambda how: how.__name__)
def test_a_sample_of_the_table(how):
    test_table(how, "attached", METHODS[0])
    torch._dynamo.reset()
    test_table(how, "compiled", METHODS[1])


def test_attaching_to_what_is_compiled_says_what_runs_uncompiled():
    model, _ = tiny("llava")
    model.compile(**COMPILE)
    with pytest.warns(UserWarning, match="LlavaForConditionalGeneration: compiled, but prefills run uncompiled"):
        eg.FastV(keep=5)(model).remove()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["visionzip:keep=5", "illava:keep=9,layer=3,vision_layers=[0,1],vision_drop=2"])
def test_a_compiled_tower_steps_aside_for_methods_that_act_in_it(method):
    model, inputs = tiny("llava", batch=2)
    with parse(method)(model):
        wanted = both(model, inputs)
    compile_tower(model)
    with parse(method)(model):
        assert same(both(model, inputs), wanted)


def test_a_compiled_caller_is_refused():
    model, inputs = tiny("llava")

    @torch.compile(**COMPILE)
    def step(batch):
        return model(**batch).logits

    with eg.FastV(keep=5)(model), torch.no_grad(), pytest.raises(AttachError, match="compile"):
        step(inputs)


@torch.no_grad()
def test_text_only_may_be_compiled_afterwards():
    model, inputs = tiny("llava", images=0)
    dense = model(**inputs).logits
    with eg.FastV(keep=5)(model):
        model.compile(**COMPILE)
        assert torch.allclose(model(**inputs).logits, dense, atol=1e-5)


def test_decoding_stays_compiled():
    """What was compiled still is what decodes: a graph is made, of one token."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    model, inputs = tiny("llava")
    model.forward = torch.compile(model.forward, backend=backend)
    with eg.FastV(keep=5)(model) as run:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert not graphs
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert graphs and run.trace.visual_tokens()[-1] == 5


@pytest.mark.slow
def test_a_trainer_that_compiles_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, inputs = tiny("llava", batch=2)
    data = [{**{k: v[i] for k, v in inputs.items()}, "labels": inputs["input_ids"][i]} for i in range(2)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        torch_compile=True,
        torch_compile_backend="eager",
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    with eg.FastV(keep=5)(model), pytest.raises(AttachError, match="torch_compile=False"):
        transformers.Trainer(model, arguments, train_dataset=data).train()


def test_a_copy_of_a_compiled_model_is_neither_compiled_nor_pruned():
    model, inputs = tiny("llava")
    dense = model(**inputs).logits
    model.forward = torch.compile(model.forward, **COMPILE)
    with eg.FastV(keep=5)(model):
        twin = copy.deepcopy(model)
    assert isinstance(twin.forward, types.MethodType) and twin.forward.__self__ is twin
    assert torch.equal(twin(**inputs).logits, dense)


def test_a_decoder_that_was_exchanged_is_an_error():
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model):
        old, model.model.language_model = decoder(model), copy.deepcopy(decoder(model))
        with pytest.raises(NothingPrunedError, match="replaced"):
            model(**inputs)
        model.model.language_model = old
        assert isinstance(model(**inputs).logits, torch.Tensor)


def test_nothing_compiled_is_left_alone():
    model, _ = tiny("llava")
    modules = {id(m): dict(m.__dict__) for m in model.modules() if isinstance(m, nn.Module)}
    with eg.FastV(keep=5)(model):
        assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(m.__dict__.keys() == modules[id(m)].keys() for m in model.modules())


@pytest.mark.slow
def test_compiled_steps_of_layers_that_share_keys_are_refused():
    model, inputs = tiny("gemma4_e")
    options = {"cache_implementation": "static", "max_new_tokens": 3, "do_sample": False}
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    with eg.Uniform(keep=4, layer=4)(model), pytest.raises(AttachError, match="disable_compile=True"):
        model.generate(**inputs, **options, compile_config=config)


@pytest.mark.parametrize("method", ["fastv:keep=5", "illava:keep=9,layer=3,vision_layers=[0,1],vision_drop=2"])
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_trace_is_refused(method):
    """It would keep the same tokens of every other prompt."""
    model, inputs = tiny("llava")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, pixels):
            return self.model(input_ids=ids, pixel_values=pixels, use_cache=False).logits

    given = (inputs["input_ids"], inputs["pixel_values"])
    with torch.no_grad(), parse(method)(model), pytest.raises(AttachError, match=r"torch\.jit\.trace"):
        torch.jit.trace(Logits().eval(), given, check_trace=False)
