"""An exception at every point at which the code of others may run inside a call of an attached model.

python tests/interrupts.py            every point, every way out, every kind of stage; prints the count
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from evengaze.engine import tap
from evengaze.methods import parse
from evengaze.testing import tiny

WAYS_OUT = (KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit)
METHODS = (
    "fastv:keep=5",
    "fastv-masked:keep=5",
    "himap:layers=[2,4],keep=[8,4]",
    "pyramiddrop:layers=[2,4],keep=[8,4]",
    "sparsevlm:layers=[1,3],keep=[9,4]",
    "tokencarve:keep=5",
    "uniform:keep=5,layer=0",
    "visionzip:keep=5",
    "illava:keep=9,layer=3,vision_layers=[0,1],vision_drop=2",
)

Point = Callable[[Any, Callable[[], None]], contextlib.AbstractContextManager[dict[str, Any]]]
"""From a model and what shall happen there to a context in which it does; its value are options for `generate`."""


def points(model: Any) -> dict[str, Point]:
    """Every point by name: before (outside and inside of the pruner's hooks) and behind every module, inside of what is
    called between modules, and what `generate` calls."""
    found: dict[str, Point] = {}
    for name in (name for name, _ in model.named_modules()):
        for side in ("outside", "inside", "behind"):
            found[f"{side} {name or 'model'}"] = module_point(name, side)
    for owner, name in (
        (lambda m, p: m.model, "get_image_features"),
        (lambda m, p: m.model, "get_placeholder_mask"),
        (lambda m, p: m, "prepare_inputs_for_generation"),
        (lambda m, p: tap, "_implementation"),
        (lambda m, p: tap, "_states"),
    ):
        found[f"in {name}"] = function_point(owner, name)
    found["in a streamer"] = option_point("streamer", lambda act: _Streamer(act))
    found["in a logits processor"] = option_point("logits_processor", lambda act: LogitsProcessorList([_Logits(act)]))
    found["in a stopping criterion"] = option_point("stopping_criteria", lambda act: StoppingCriteriaList([_Stop(act)]))
    return found


def module_point(name: str, side: str) -> Point:
    """Around the call of a module."""

    @contextlib.contextmanager
    def point(model: Any, act: Callable[[], None]) -> Iterator[dict[str, Any]]:
        module = model.get_submodule(name)
        if side == "behind":
            hook = module.register_forward_hook(lambda module, args, out: act())
        else:
            hook = module.register_forward_pre_hook(lambda module, args: act(), prepend=side == "outside")
        try:
            yield {}
        finally:
            hook.remove()

    return point


def function_point(owner_of: Any, name: str) -> Point:
    """Inside of a function."""

    @contextlib.contextmanager
    def point(model: Any, act: Callable[[], None]) -> Iterator[dict[str, Any]]:
        owner = owner_of(model, None)
        there, old = name in vars(owner), getattr(owner, name)

        @functools.wraps(old)
        def instead(*args: Any, **kwargs: Any) -> Any:
            result = old(*args, **kwargs)
            act()
            return result

        setattr(owner, name, instead)
        try:
            yield {}
        finally:
            if there:
                setattr(owner, name, old)
            else:
                delattr(owner, name)

    return point


def option_point(name: str, make: Callable[[Callable[[], None]], Any]) -> Point:
    """In an object that is handed to `generate`."""

    @contextlib.contextmanager
    def point(model: Any, act: Callable[[], None]) -> Iterator[dict[str, Any]]:
        yield {name: make(act)}

    return point


class _Streamer(BaseStreamer):  # type: ignore[misc]
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def put(self, value: Any) -> None:
        self.act()

    def end(self) -> None:
        self.act()


class _Logits(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.act()
        return scores


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a module holds, by identity, and the type of its config; less what Qwen's own forward notes."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key == "rope_deltas":
                continue
            inner = tuple((k, id(v)) for k, v in value.items()) if isinstance(value, dict) else None
            state[f"{name}.{key}"] = (id(value), type(value), inner)
        state[f"{name}.__class__"] = type(module)
        config = module.__dict__.get("config")
        state[f"{name}.config.__dict__"] = None if config is None else str(config.__dict__)
    return state


def answer(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Tokens and logits of a short generation."""
    out = model.generate(
        **inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.cat([out.sequences.float(), *out.logits], 1)


@torch.no_grad()
def check(method: str, *, every: int = 1, start: int = 0, ways: int = len(WAYS_OUT), later: int = 2) -> int:
    """Interrupt calls at every point; returns how many interrupts there were.

    Args:
        method: the pruner, as text.
        every: take only every so many points,
        start: beginning with this one.
        ways: exceptions tried at a point; which ones goes round.
        later: an interrupt comes when the point is passed for the first, second, ... or this time; goes round.
    """
    model, inputs = tiny("llava")
    answer(model, inputs)  # transformers installs hooks of its own in the first call
    before = snapshot(model)
    handle = parse(method)(model)
    logits, expected = model(**inputs).logits, answer(model, inputs)
    count, kept = 0, []
    passes, exceptions = itertools.cycle(range(later)), itertools.cycle(WAYS_OUT)
    for name, point in list(points(model).items())[start::every]:
        for _ in range(ways):
            error, left = next(exceptions), [next(passes)]

            def act(error: Any = error, left: list[int] = left, name: str = name) -> None:
                left[0] -= 1
                if left[0] == -1:
                    raise error(name)

            for whole in (True, False):
                with point(model, act) as options:
                    left[0] = 0 if not whole else left[0]
                    try:
                        answer(model, inputs, **options) if whole else model(**inputs)
                    except BaseException as caught:
                        if type(caught) is not error or str(caught) != name:
                            raise
                        count += 1
                        kept = [*kept[-3:], caught]  # as debuggers do: tracebacks keep frames, and what is in them
                assert torch.equal(model(**inputs).logits, logits), f"{method}: after {error.__name__} {name}"
                assert torch.equal(answer(model, inputs), expected), f"{method}: after {error.__name__} {name}"
    handle.remove()
    assert snapshot(model) == before, f"{method}: the model is not what it was"
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    total = 0
    for text in arguments.methods:
        done = check(text, every=arguments.every)
        total += done
        print(f"{text}: {done} interrupts, every next call as if nothing had happened, model restored", flush=True)
    print(f"{total} interrupts")
