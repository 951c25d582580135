"""The state of a call belongs to the call: threads, interrupts, calls inside of calls, copies, attaching meanwhile."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import threading
import time

import pytest
import torch

import evengaze as eg
from evengaze.compat import cache_argument, cache_of
from evengaze.engine.tap import Tap
from evengaze.errors import AttachError, NothingPrunedError
from evengaze.methods import parse
from evengaze.testing import tiny
from interrupts import METHODS, answer, check, points, snapshot
from threads import hammer

TOWER = ("visionzip", "illava")


# -- threads ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [2, 4, 8])
@pytest.mark.parametrize("method", [METHODS[0], METHODS[3], METHODS[-1]])
def test_threads_share_a_handle(method, threads):
    assert hammer(method, threads, 3) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_threads_share_a_handle_whatever_the_stage(method, family):
    if family != "llava" and method.startswith(TOWER):
        pytest.skip("no patches leave these towers")
    method = method.replace("keep=5", "keep=5,layer=4") if family == "gemma3" and "fastv" in method else method
    assert hammer(method, 4, 4, family) == (0, [])


@pytest.mark.parametrize("method", ["fastv:keep=5", "pyramiddrop:layers=[2,4],keep=[8,4]", "visionzip:keep=5"])
def test_two_calls_between_arming_and_use_of_a_tap(method):
    model, inputs = tiny("llava")
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    found = {}
    with parse(method)(model):
        expected = [model(**job).logits for job in (inputs, other)]
        both = threading.Barrier(2, timeout=30)
        tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        layers = [model.model.language_model.layers[1], tower.encoder.layers[1]]
        hooks = [layer.register_forward_pre_hook(lambda *_: (both.wait(), None)[1]) for layer in layers]

        def call(k, job):
            found[k] = model(**job).logits

        pool = [threading.Thread(target=call, args=(k, job)) for k, job in enumerate((inputs, other))]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(found[k], expected[k]) for k in range(2))


def busy(model, inputs):
    """A thread that is in the middle of a generation until told to go on."""
    inside, go_on, out = threading.Event(), threading.Event(), []

    def hook(*_):
        inside.set()
        go_on.wait(30)

    handle = model.lm_head.register_forward_pre_hook(hook)
    thread = threading.Thread(
        target=lambda: out.append(model.generate(**inputs, max_new_tokens=3, do_sample=False)), name="busy"
    )
    thread.start()
    assert inside.wait(30)
    return thread, go_on, out, handle


def test_attaching_in_the_middle_of_another_threads_call_is_refused():
    model, inputs = tiny("llava")
    expected, before = model.generate(**inputs, max_new_tokens=3, do_sample=False), snapshot(model)
    thread, go_on, out, hook = busy(model, inputs)
    with pytest.raises(AttachError, match="thread busy"):
        eg.FastV(keep=5)(model)
    go_on.set()
    thread.join()
    hook.remove()
    assert torch.equal(out[0], expected)
    assert snapshot(model) == before
    with eg.FastV(keep=5)(model):
        pass


def test_removing_waits_for_another_threads_call():
    model, inputs = tiny("llava")
    handle = eg.FastV(keep=3, layer=1)(model)
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    thread, go_on, out, hook = busy(model, inputs)
    remover = threading.Thread(target=handle.remove)
    remover.start()
    time.sleep(0.05)
    assert remover.is_alive()
    go_on.set()
    remover.join(30)
    thread.join()
    hook.remove()
    assert torch.equal(out[0], expected) and len(handle.traces) == 2


@pytest.mark.parametrize("what", ["remove", "attach"])
def test_not_from_inside_of_a_call(what):
    model, inputs = tiny("llava")
    handle = eg.FastV(keep=5)(model)
    act = handle.remove if what == "remove" else lambda: eg.Uniform(keep=5)(model)
    hook = model.model.language_model.layers[3].register_forward_pre_hook(lambda *_: act())
    with pytest.raises(AttachError, match=r"inside of it|already has fastv"):
        model(**inputs)
    hook.remove()
    handle.remove()


# -- interrupts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_whatever_ends_a_call_the_next_is_right_and_the_model_is_restored(method):
    """A sample of the points; `python tests/interrupts.py` takes them all."""
    assert check(method, every=41, start=METHODS.index(method), ways=2) > 10


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_interrupts_at_every_point(method):
    assert check(method, ways=1) > 200


def test_taps_are_idempotent_and_restore_what_was_there():
    model, inputs = tiny("llava")
    module = model.model.language_model.layers[1].self_attn
    config, found = module.config, []
    taps = [Tap(module) for _ in range(3)]
    assert module.config._attn_implementation == "sdpa" and type(module.config).__name__ == type(config).__name__
    for tap in taps:
        tap.arm(found.append)
        tap.arm(found.append)
    name = module.config._attn_implementation
    assert name == "sdpa" and name in ("eager", "sdpa") and "flash" not in name and f"{name}" == "sdpa"
    expected = model(**inputs).logits
    assert len(found) == 3 and not any(tap.disarm() for tap in taps)
    assert torch.equal(model(**inputs).logits, expected) and len(found) == 3
    model.set_attn_implementation("eager")
    assert module.config._attn_implementation == config._attn_implementation == "eager"
    for tap in (*taps, *taps):
        tap.remove()
    assert module.config is config


def test_a_second_turn_with_a_picture_under_fastv_masked():
    model, inputs = tiny("llava", images=1)
    with eg.methods.parse("fastv-masked:keep=5")(model):
        first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
        cache = cache_of(first)
        for _ in range(2):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs["pixel_values"],
                **cache_argument(model, copy.deepcopy(cache)),
                max_new_tokens=3,
            )
        assert out.shape[1] == ids.shape[1] + 3
    assert model(**inputs).logits.isfinite().all()


# -- calls inside of calls --------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_calls_inside_of_calls(method):
    """At any point, a hook, a streamer or a logits processor may ask the model something else."""
    model, inputs = tiny("llava")
    _, other = tiny("llava", batch=2, seed=5)
    with parse(method)(model) as run:
        whole, logits = answer(model, inputs), model(**inputs).logits
        inner = [answer(model, other), model(**other).logits]
        for number, (name, point) in enumerate(points(model).items()):
            if "tower" in name and method.startswith(TOWER):
                continue  # a tower inside of itself
            if (number + METHODS.index(method)) % 31:
                continue
            state = {"inside": False, "done": 0}

            def act(state=state):
                if state["inside"] or state["done"] == 2:
                    return
                state["inside"] = True
                assert torch.equal(answer(model, other), inner[0])
                assert torch.equal(model(**other).logits, inner[1])
                state["inside"] = False
                state["done"] += 1

            with point(model, act) as options:
                assert torch.equal(answer(model, inputs, **options), whole), name
                state["done"] = 0
                assert torch.equal(model(**inputs).logits, logits), name
    assert run.traces[-1] is run.trace


def test_all_traces_are_recorded():
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model) as run:
        for _ in range(3):
            model(**inputs)
        assert len(run.traces) == 3 and run.traces[-1] is run.trace and run.traces.maxlen == 1000
        model(**inputs)
    assert len(run.traces) == 4 and len({id(t) for t in run.traces}) == 4


# -- copies -----------------------------------------------------------------------------------------------------------
def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@torch.no_grad()
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("method", ["fastv:keep=5,layer=4", "pyramiddrop:layers=[2,4],keep=[8,4]", METHODS[-1]])
def test_a_copy_of_an_attached_model_is_the_model_without_a_pruner(method, family, how):
    if family != "llava" and method.startswith(TOWER):
        pytest.skip("no patches leave this tower")
    dense = answer(*tiny(family))
    model, inputs = tiny(family)
    with parse(method)(model) as run:
        twin = COPIES[how](model)  # first: after a call, hooks of transformers itself cannot be pickled
        pruned = answer(model, inputs)
        count = len(run.traces)
        assert torch.equal(answer(twin, inputs), dense) and len(run.traces) == count
        for weight in twin.parameters():
            weight.mul_(1.01)  # of its own
        assert torch.equal(answer(model, inputs), pruned)
        changed = answer(twin, inputs)
        for weight in model.parameters():
            weight.mul_(0)
        assert torch.equal(answer(twin, inputs), changed)
        with parse(method)(twin) as second:
            assert not torch.equal(answer(twin, inputs), changed) and len(second.traces) == 1


def test_a_shallow_copy_is_refused():
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model):
        with pytest.raises(AttachError, match="shallow copy"):
            copy.copy(model)(**inputs)
        with pytest.raises(AttachError, match="shallow copy"):
            copy.copy(model.model.language_model)(inputs_embeds=torch.zeros(1, 4, 32))
    copy.copy(model)(**inputs)


def test_replicas_of_data_parallel_are_refused():
    """torch.nn.parallel.replicate makes them by this method of every module."""
    model, _ = tiny("llava")
    with eg.FastV(keep=5)(model):
        for module in (model, model.model, model.model.language_model):
            with pytest.raises(AttachError, match="DataParallel"):
                module._replicate_for_data_parallel()
    assert type(model._replicate_for_data_parallel()) is type(model)


# -- modules that are exchanged, as quantisation does -----------------------------------------------------------------
class Rounded(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, (self.weight * 64).round() / 64, self.bias)


def test_linear_layers_may_be_exchanged_while_attached():
    model, inputs = tiny("llava")

    def exchange():
        for module in list(model.model.language_model.modules()):
            for name, child in module.named_children():
                if type(child) is torch.nn.Linear:
                    new = Rounded(child.in_features, child.out_features, child.bias is not None)
                    new.load_state_dict(child.state_dict())
                    setattr(module, name, new)

    with eg.FastV(keep=5)(model):
        exchange()
        inside = model(**inputs).logits
    with eg.FastV(keep=5)(model):
        assert torch.equal(model(**inputs).logits, inside)


def test_an_exchanged_attention_is_read_an_exchanged_layer_is_an_error():
    model, inputs = tiny("llava")
    layers = model.model.language_model.layers
    with eg.FastV(keep=5)(model):
        expected = model(**inputs).logits
        layers[1].self_attn = copy.deepcopy(layers[1].self_attn)
        assert torch.equal(model(**inputs).logits, expected)
    before = snapshot(model)
    for i in (2, 4):
        with eg.FastV(keep=5)(model):
            old, layers[i] = layers[i], copy.deepcopy(layers[i])
            with pytest.raises((NothingPrunedError, RuntimeError)):
                model(**inputs)
            layers[i] = old
        assert snapshot(model) == before


def test_of_threads_that_attach_at_once_one_does():
    model, inputs = tiny("llava")
    expected = model(**inputs).logits
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-3)  # shorter ones leave busy machines no time but for switching
    try:
        for _ in range(40):
            ready, handles = threading.Barrier(6), []

            def attach(ready=ready, handles=handles):
                ready.wait()
                with contextlib.suppress(AttachError):
                    handles.append(eg.FastV(keep=5)(model))

            threads = [threading.Thread(target=attach) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(handles) == 1
            handles[0].remove()
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_handle_is_neither_copied_nor_pickled_but_what_it_found_is():
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model) as run:
        model(**inputs)
        for again in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(AttachError, match="neither copied nor pickled"):
                again(run)
        for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
            assert again(run.pruner) == run.pruner
            assert torch.equal(again(run.trace).kept(), run.trace.kept())
